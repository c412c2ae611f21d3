# SPDX-License-Identifier: Apache-2.0
"""A tripwire: the private names of other packages that the sources use, each with its signature.

An upgrade that renames one or changes its parameters fails here, by name. `private_names.json` is the list: for each
package, "module:Class.member" with the names of the parameters ("=": with a default) or the kind of an attribute; null
is what the machine that wrote the list does not have, such as kernels for a GPU.

Private is a name with a leading underscore, and what is imported from a module that its package does not document
(`DOCUMENTED` is what they do). After reading what an upgrade changed, and changing the sources where it matters,
`python -m tests.test_private_names` writes the list anew for the versions installed here.
"""

import ast
import functools
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("private_names.json")
SOURCES = Path(__file__).resolve().parent.parent / "src" / "hmf"
# Modules whose contents are public; "torch." stands for all modules without an underscore, as torch promises.
DOCUMENTED = {
    "accelerate": ("accelerate", "accelerate.utils"),
    "fla": ("fla.ops.gated_delta_rule", "fla.ops.kda", "fla.ops.simple_gla"),
    "lm_eval": ("lm_eval", "lm_eval.tasks"),
    "peft": ("peft",),
    "torch": ("torch.",),
    "transformers": ("transformers", "transformers.utils"),
    "triton": ("triton", "triton.language"),
    "trl": ("trl",),
    "vllm": ("vllm",),
}
# Classes that the sources meet without importing them.
OWNERS = {
    "accelerate": ("accelerate:Accelerator",),
    "torch": ("torch.nn:Module",),
    "transformers": ("transformers:PreTrainedConfig", "transformers:GenerationConfig"),
    "trl": ("trl:DistillationTrainer",),
}
STANDARD = {"_actions", "_exit", "_replace"}  # of argparse, os and named tuples


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {
        str(file.relative_to(SOURCES)): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES.rglob("*.py")
    }


def imported() -> dict[str, set[str]]:
    """Package -> "module:name" of everything that the sources import from it."""
    found: dict[str, set[str]] = {package: set() for package in DOCUMENTED}
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in found:
                package = str(node.module).split(".")[0]
                found[package] |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if (package := alias.name.split(".")[0]) in found:
                        found[package].add(f"{alias.name}:")
    return found


def internal_imports(package: str) -> set[str]:
    """Those of `imported` that are not documented."""

    def documented(name: str) -> bool:
        module, _, member = name.partition(":")
        if any(is_private(part) for part in [*module.split("."), member]):
            return False
        return module in DOCUMENTED[package] or any(open_.endswith(".") for open_ in DOCUMENTED[package])

    return {name for name in imported()[package] if not documented(name)}


def underscored() -> tuple[dict[str, str], set[str]]:
    """Private names that the sources read, override or hand over, each with a place; and those that they define.

    Names stand as attributes, in the bodies of classes, as keys of dicts and of keyword arguments, and as the second
    argument of getattr and its like.
    """
    places: dict[str, str] = {}
    own: set[str] = set()
    for file, tree in trees().items():
        for node in ast.walk(tree):
            names: list[Any] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in ("self", "cls"):
                    own |= set(filter(is_private, names))
            elif isinstance(node, ast.ClassDef):
                names = list(members(node))
                own |= set(filter(is_private, names))
            elif isinstance(node, ast.Dict):
                names = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            elif isinstance(node, ast.Call):
                names = [keyword.arg for keyword in node.keywords]
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("getattr", "hasattr", "setattr", "__setattr__") and isinstance(
                    node.args[1], ast.Constant
                ):
                    names.append(node.args[1].value)
            for name in filter(is_private, names):
                places.setdefault(name, f"{file}:{getattr(node, 'lineno', 0)}")
    return places, own


def members(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            yield item.name
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def resolve(name: str) -> Any:
    """What "module:Class.member" names, as its class holds it; AttributeError or ImportError where it is not there."""
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        value = inspect.getattr_static(value, part) if isinstance(value, type) else getattr(value, part)
    return value


def describe(name: str) -> str:
    """The names of the parameters of what `name` names ("=": it has a default), or its kind, or "missing"."""
    module, _, path = name.partition(":")
    try:
        value = resolve(name)
    except AttributeError:
        owner, _, member = path.rpartition(".")
        return "set by its methods" if owner and sets(resolve(f"{module}:{owner}"), member) else "missing"
    except ImportError:
        return "missing"
    value = getattr(value, "__func__", value)
    if inspect.ismodule(value) or not callable(value) or isinstance(value, property):
        return type(value).__name__
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # of a class without a constructor in Python
        return "type"
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(marks.get(x.kind, "") + x.name + "=" * (x.default is not x.empty) for x in parameters)


def sets(cls: type, name: str) -> bool:
    """Whether the methods of a class give its objects an attribute `name`."""
    return f"self.{name} = " in source(cls) or f"self.{name}: " in source(cls)


@functools.cache
def source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # not written in Python
        return ""


def used(package: str) -> set[str]:
    """The private names of an installed package that the sources use: imported ones, and those that a class or function
    from there defines under a name that the sources have."""
    found = internal_imports(package)
    places, own = underscored()
    for owner in (*imported()[package], *OWNERS.get(package, ())):
        try:
            value = resolve(owner)
        except (ImportError, AttributeError):
            continue  # of a part that is not installed; what was there fails by the list
        if not isinstance(value, type):
            continue
        bases = [base for base in value.__mro__ if base.__module__.split(".")[0] == package]
        for name in places:
            homes = [base for base in bases if name in vars(base)]
            if not homes and name not in own:
                homes = [base for base in bases if sets(base, name)]
            found |= {f"{base.__module__}:{base.__qualname__}.{name}" for base in homes}
    return found


def listed() -> dict[str, dict[str, str | None]]:
    return json.loads(LIST.read_text(encoding="utf-8"))


PACKAGES = [pytest.param(name, marks=pytest.mark.vllm) if name == "vllm" else name for name in DOCUMENTED]


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("package", PACKAGES)
def test_private_names_are_as_they_were(package):
    require(package)
    known = {name: signature for name, signature in listed()[package].items() if signature is not None}
    assert {name: describe(name) for name in known} == known


@pytest.mark.parametrize("package", PACKAGES)
def test_every_private_name_is_listed(package):
    missing = internal_imports(package) - listed()[package].keys()
    assert not missing, "not in tests/private_names.json"
    require(package)
    assert not used(package) - listed()[package].keys(), "not in tests/private_names.json"


def test_every_underscored_name_is_ours_or_listed():
    places, own = underscored()
    known = {re.split(r"[.:]", name)[-1] for names in listed().values() for name in names}
    assert not {name: place for name, place in places.items() if name not in own | known | STANDARD}


def test_a_changed_name_is_noticed(monkeypatch):
    transformers = pytest.importorskip("transformers")
    name = "transformers.modeling_utils:PreTrainedModel._init_weights"
    assert name in used("transformers")
    before = describe(name)
    monkeypatch.setattr(transformers.PreTrainedModel, "_init_weights", lambda self, module, buffers=True: None)
    assert describe(name) != before
    monkeypatch.delattr(transformers.PreTrainedModel, "_init_weights")
    assert describe(name) == "missing"


def main() -> None:
    names = listed() if LIST.is_file() else {}
    for package in DOCUMENTED:
        known, installed = names.get(package, {}), importlib.util.find_spec(package) is not None
        names[package] = {name: known.get(name) for name in sorted(internal_imports(package))}
        if installed:
            now = {name: describe(name) for name in sorted(used(package))}
            names[package] |= {name: signature for name, signature in now.items() if signature != "missing"}
    LIST.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
