# SPDX-License-Identifier: Apache-2.0
"""Models and data files of the Hugging Face Hub by name: what is a name, and where the library's cache has the files.

Downloads go on where they stopped, and HF_HUB_OFFLINE, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN mean what they always do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from hmf.errors import HmfError

# A Path of "hf://owner/name" has one slash less.
_MODEL = re.compile(r"(hf:/{1,2})?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = re.compile(r"hf:/{1,2}datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/@]+))?(?:/(.+))?")
# What describes a model, its text, its generation and its licence; pickled weights and code are never asked for.
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]


@dataclass(frozen=True)
class Model:
    """`name` ("owner/name") at a `revision`: a branch, a tag or a commit; None: the main branch."""

    name: str
    revision: str | None
    explicit: bool  # written with hf://, so that it is no folder


def parse_model(text: str) -> Model | None:
    """`"Qwen/Qwen3-8B@main"` or `"hf://Qwen/Qwen3-8B"` as a model; None for what can only be a folder."""
    match = _MODEL.fullmatch(text)
    return Model(match[2], match[3], match[1] is not None) if match else None


def model_folder(model: Model, weights: bool = True) -> Path:
    """The model's files in the cache, as a checkpoint directory; HmfError where they are not to be had.

    weights: whether they are needed; else a few small files are fetched.
    """
    return _snapshot(model.name, model.revision, "model", [*_DESCRIPTION, *(_WEIGHTS if weights else ())])


def is_data(path: str) -> bool:
    return re.match(r"hf:/", path) is not None


def data_path(place: str, path: str) -> Path:
    """`"hf://datasets/owner/name@revision/some/*.parquet"` as the same path in the cache, with the files fetched.

    place: of the path in its recipe, for errors.
    """
    match = _FILES.fullmatch(path)
    if match is None:
        raise HmfError(f"{place}: {path}: write hf://datasets/OWNER/NAME, then @REVISION and /FILES if they are needed")
    name, revision, inner = match.groups()
    patterns = None if inner is None else [inner] if has_magic(inner) else [inner, f"{inner.rstrip('/')}/*"]
    if patterns and "**/" in (inner or ""):  # ** may stand for no folder
        patterns.append(str(inner).replace("**/", ""))
    return _snapshot(name, revision, "dataset", patterns) / (inner or "")


def require_repository(name: str) -> None:
    """HmfError for what is no name OWNER/NAME of a repository to upload to, or is a folder here."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    if Path(name).exists():
        raise HmfError(f"--repo {name}: is a folder here; name a repository of the Hub, as OWNER/NAME")
    if name.count("/") != 1:
        raise HmfError(f"--repo {name}: write OWNER/NAME, with the user or organisation that the repository is for")
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise HmfError(f"--repo {name}: is no name of the Hub ({_line(error)}); correct it") from None


def upload(name: str, files: Mapping[str, Path | bytes], private: bool = False) -> str:
    """Send `files`, by their path in the repository, as one commit to the model repository `name`; made if missing.

    Returns its address. HmfError where the Hub does not take them.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi(library_name="hmf")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, operations, commit_message="Model and card from Hybrid Model Factory")
    except errors.OfflineModeIsEnabled:
        raise HmfError(f"{name}: HF_HUB_OFFLINE is set; unset it, or look with --dry-run") from None
    except errors.LocalTokenNotFoundError:
        raise HmfError(f"{name}: no token for the Hub; set HF_TOKEN, or run hf auth login") from None
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise HmfError(f"{name}: the Hub did not take it: {_line(error)}; check the name and HF_TOKEN") from None
    except OSError as error:
        raise HmfError(f"{name}: cannot be sent: {error.strerror or _line(error)}; run it again") from None
    return str(address)


def _snapshot(name: str, revision: str | None, kind: str, patterns: list[str] | None) -> Path:
    import httpx
    from huggingface_hub import constants, errors, snapshot_download
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **{**given, "disable": None, "leave": False})  # in a terminal only

    at = f"{name}{f'@{revision}' if revision else ''}"
    other = f"no such directory, and no {kind} of the Hub" if kind == "model" else f"no {kind} of the Hub"
    try:
        return Path(
            snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=constants.HF_HUB_OFFLINE,
                tqdm_class=Bar,
                library_name="hmf",
            )
        )
    except errors.RevisionNotFoundError:
        raise HmfError(
            f"{at}: the {kind} has no revision {revision or 'main'!r}; name a branch, tag or commit"
        ) from None
    except errors.GatedRepoError:
        raise HmfError(f"{at}: access to this {kind} must be asked for on its page; then set HF_TOKEN") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise HmfError(f"{at}: {other} by that name; correct it, or set HF_TOKEN if it is private") from None
    except errors.LocalEntryNotFoundError as error:
        reason = f"the Hub cannot be reached: {_line(error.__cause__)}" if error.__cause__ else "HF_HUB_OFFLINE is set"
        if isinstance(error, errors.IncompleteSnapshotError):
            raise HmfError(f"{at}: only in part in the Hub's cache, and {reason}; fetch the rest online") from None
        missing = "no such directory, and " if kind == "model" else ""
        raise HmfError(
            f"{at}: {missing}not in the Hub's cache ({reason}); correct the name, or fetch it online"
        ) from None
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise HmfError(f"{at}: the Hub cannot be reached: {_line(error)}; run it again to go on") from None
    except OSError as error:
        raise HmfError(f"{at}: cannot be fetched: {error.strerror or _line(error)}; run it again to go on") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
