# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, the layout of help texts, and early checks of paths."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from hmf import hub
from hmf.errors import HmfError, rewriting
from hmf.folders import find_recipe, resolve_base

Dtype = Literal["float32", "bfloat16"]
DEFAULT_MIXER = "gdn"
NativeFormat = Literal["qwen3_5", "qwen3_next"]
Out = Annotated[Path, typer.Option(help="Output directory; it must be empty or not exist.")]
RecipeFile = Annotated[
    Path,
    typer.Argument(
        parser=find_recipe,
        help='YAML file, or the name of a recipe that comes with hmf, such as "quickstart" or "quickstart/sft".',
        metavar="RECIPE.yaml",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="Device to run on. Default: cuda if a GPU is available, else cpu.")
]
Mixer = Annotated[
    str | None, typer.Option(help="Type of the layers that replace attention.", show_default=DEFAULT_MIXER)
]
Ratio = Annotated[float | None, typer.Option(min=0, max=1, help="Share of layers to replace.")]
HYBRID = "Checkpoint directory, or model of the Hub (OWNER/NAME@revision)."
MODEL = 'Checkpoint directory, model of the Hub (Qwen/Qwen3-8B@revision), or "teacher".'
CONFIG = f"{MODEL} Only config.json is needed."
PATTERN = (
    "One symbol per layer, joined by '-': * keeps the base's layer; GDN, KDA, GKA, M2, BMF and SWA replace attention; "
    "GDN>GKA replaces a GDN layer of the base."
)


MOST = 2**24  # tokens, as in recipes


def tokens(help: str, least: int = 1) -> Any:
    """An option for a number of tokens from `least` to `MOST`, which may be written as 128K or 1M."""
    return typer.Option(parser=lambda value: _parsed(value, least), metavar="TOKENS", help=help)


def count(help: str, most: int = 2**16) -> Any:
    """An option for a number of things that are held in memory, from 1 to `most`."""
    return typer.Option(min=1, max=most, help=help)


def token_list(help: str, **options: Any) -> Any:
    """An option for several numbers of tokens, joined by commas; the value is a tuple."""

    def parse(value: str) -> tuple[int, ...]:
        return tuple(_parsed(part, 1) for part in value.split(","))

    return typer.Option(parser=parse, metavar="TOKENS,...", help=help, **options)


def _parsed(value: str | int, least: int) -> int:
    from hmf.config.strict import parse_tokens

    try:
        number: int = parse_tokens(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if number < least:
        raise typer.BadParameter(f"{number} is less than {least}")
    if number > MOST:
        raise typer.BadParameter(f"{number} is more than {MOST}")
    return number


BatchedTokens = Annotated[int, tokens("vLLM's --max-num-batched-tokens: largest number of tokens in a step.")]
KVCacheDtype = Annotated[
    Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"],
    typer.Option(help="vLLM's option: dtype of keys and values. auto: the model's."),
]
StateCacheDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="vLLM's option: dtype of recurrent states. auto: state_dtype of config.json."),
]
Compose = Annotated[
    str | None,
    typer.Option(
        metavar="KEYS,STATES",
        help='Process a long prompt in separate chunks, and combine keys and states as named: "concatenated,fused".',
    ),
]
ComposeChunk = Annotated[
    int, tokens("With --compose: longest chunk. Prefix, chunk and answer should fit the trained length.", 16)
]


def replacement(mixer: str | None, ratio: float | None, pattern: str | None) -> Any:
    """The `HybridSettings` for --mixer, --ratio and --pattern; None without all of them.

    Raises:
        HmfError: --ratio and --pattern are both given, or --mixer without the --ratio that it is read with.
    """
    if ratio is not None and pattern is not None:
        raise HmfError("give at most one of --ratio and --pattern")
    if mixer is not None and ratio is None:
        fix = "add --ratio 0.5, or omit --mixer" if pattern is None else "the pattern names the types; omit --mixer"
        raise HmfError(f"--mixer: is read with --ratio; {fix}")
    if ratio is None and pattern is None:
        return None
    from hmf.config.runs import HybridSettings

    return HybridSettings(mixer=DEFAULT_MIXER if mixer is None else mixer, ratio=ratio, pattern=pattern)


def composition(compose: str | None, chunk: int) -> Any:
    """The `Composition` for the options --compose and --compose-chunk; None without --compose."""
    if compose is None:
        return None
    from hmf.evaluation.chunks import Composition

    with rewriting(lambda message: f"--{message}"):
        return Composition.parse(compose, chunk=chunk)


def with_checkpoint(settings: Any, key: str) -> Any:
    """The recipe with the checkpoint at `key` resolved to a directory. Imports nothing that takes seconds.

    Raises:
        HmfError: the checkpoint, or data that the recipe reads, does not exist; the message names the key.
    """
    name = getattr(settings, key)
    require_data(settings)
    try:
        return settings.model_copy(update={key: type(name)(resolve_base(str(name)))})
    except HmfError as error:
        raise HmfError(f"{key}: {error}") from None


def command() -> str:
    """`hmf` as a user can type it here: by its name where the PATH has this one, else by its path."""
    script = Path(sys.argv[0])
    if script.name != "hmf" or not script.is_file():  # started as a module
        script = Path(sys.executable).with_name("hmf")
    if not script.is_file():
        return f"{shlex.quote(sys.executable)} -m hmf.cli"
    script = Path(os.path.abspath(script))
    on_path = shutil.which("hmf")
    if on_path is not None and os.path.realpath(on_path) == os.path.realpath(script):
        return "hmf"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


class Group(TyperGroup):
    """A group of commands. Without a command it prints its help to stderr, with exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


class Command(TyperCommand):
    """A command whose numbers are finite. Bounds of options do not refuse nan, and those without an upper one inf."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        option: Any
        for option in self.params:
            value = ctx.params.get(option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number", ctx, option)
        return rest


class App(typer.Typer):
    """A Typer app whose commands are of the class `Command`, unless they name a subclass of it."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, **({"cls": Command} | options))


def typed(*words: object) -> str:
    """A command of `hmf` with these words, as a user can type it here."""
    return f"{command()} {shlex.join(map(str, words))}"


def group(help: str, cls: type[Group] = Group, **options: Any) -> App:
    """A `Group` as a Typer app."""
    return App(cls=cls, rich_markup_mode=None, help=help, **options)


def epilog(*examples: str) -> str:
    """The end of a help text: examples, one per line."""
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])


def require_run(run: Path) -> None:
    """HmfError if the run folder does not exist. To be called before imports that take seconds."""
    if not run.is_dir():
        raise HmfError(f"{run}: no such run folder; give the output folder of hmf prime or hmf finetune")


def require_data(settings: Any, prefix: str = "") -> None:
    """HmfError if a file or folder that the recipe reads does not exist. Contents are checked later."""
    from hmf.config.places import PlaceSettings
    from hmf.config.runs import DataSettings
    from hmf.config.strict import Settings

    for name in type(settings).model_fields:
        value, key = getattr(settings, name), f"{prefix}{name}"
        is_place = isinstance(settings, PlaceSettings) and name == "path"
        if is_place or (isinstance(settings, DataSettings) and name in ("prepared", "text")):
            text = str(value or "stdlib")
            if text != "stdlib" and not has_magic(text) and not hub.is_data(text) and not Path(text).exists():
                fix = "; `hmf data prepare` writes prepared rows" if name == "prepared" else ""
                raise HmfError(f"{key}: {text}: no such file or folder{fix}")
        for index, section in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(section, Settings):
                require_data(section, f"{key}." if index is None else f"{key}.{getattr(section, 'title', index)}.")
