# SPDX-License-Identifier: Apache-2.0
"""Models and data files of the Hugging Face Hub: parsing of their names, download into the Hub's cache, and upload.

Interrupted downloads continue. HF_HUB_OFFLINE, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN work as in huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from hmf.errors import HmfError

# pathlib.Path removes one slash of "hf://owner/name".
_MODEL = re.compile(r"(hf:/{1,2})?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = re.compile(r"hf:/{1,2}datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/@]+))?(?:/(.+))?")
# Config, tokenizer, chat template, generation config and licence. Pickled weights and code are never downloaded.
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*"]
# Names of shards besides the usual ones: of Qwen3.5, and of checkpoints that were converted from pickled weights.
_WEIGHTS = [
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors-*.safetensors",
    "pytorch_model-*.safetensors",
]


@dataclass(frozen=True)
class Model:
    """A model repository `name` ("owner/name") at a `revision`: a branch, tag or commit; None is the main branch."""

    name: str
    revision: str | None
    explicit: bool  # written with hf://, so it cannot be a folder


def parse_model(text: str) -> Model | None:
    """Parse `"Qwen/Qwen3-8B@main"` or `"hf://Qwen/Qwen3-8B"`; None for a text that can only be a folder."""
    match = _MODEL.fullmatch(text)
    return Model(match[2], match[3], match[1] is not None) if match else None


def model_folder(model: Model, weights: bool = True) -> Path:
    """The checkpoint directory of the model in the Hub's cache. Missing files are downloaded.

    Args:
        weights: whether the weights are needed; otherwise only a few small files are downloaded.
    Raises:
        HmfError: the files cannot be downloaded.
    """
    return _snapshot(model.name, model.revision, "model", [*_DESCRIPTION, *(_WEIGHTS if weights else ())])


def is_data(path: str) -> bool:
    """Whether a path of a recipe names files on the Hub."""
    return re.match(r"hf:/", path) is not None


def data_path(place: str, path: str) -> Path:
    """The local path of `"hf://datasets/owner/name@revision/some/*.parquet"`; the files are downloaded into the cache.

    Args:
        place: key of the path in its recipe, for errors.
    """
    match = _FILES.fullmatch(path)
    if match is None:
        raise HmfError(f"{place}: {path}: write hf://datasets/OWNER/NAME, optionally followed by @REVISION and /FILES")
    name, revision, inner = match.groups()
    patterns = None if inner is None else [inner] if has_magic(inner) else [inner, f"{inner.rstrip('/')}/*"]
    if patterns and "**/" in (inner or ""):  # ** also matches no folder at all
        patterns.append(str(inner).replace("**/", ""))
    return _snapshot(name, revision, "dataset", patterns) / (inner or "")


def require_repository(name: str) -> None:
    """HmfError unless `name` is a valid repository name OWNER/NAME and no local path."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    if Path(name).exists():
        raise HmfError(f"--repo {name}: is a local path; give the name of a Hub repository as OWNER/NAME")
    if name.count("/") != 1:
        raise HmfError(f"--repo {name}: write OWNER/NAME, where OWNER is a user or an organisation")
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise HmfError(f"--repo {name}: is not a valid repository name ({_line(error)}); correct it") from None


def upload(name: str, files: Mapping[str, Path | bytes], private: bool = False) -> str:
    """Upload files as one commit to the model repository `name`, which is created if it does not exist.

    Args:
        files: local path or content by path in the repository.
        private: whether a repository that is created is private.
    Returns:
        URL of the repository.
    Raises:
        HmfError: the Hub does not accept the upload.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi(library_name="hmf")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, operations, commit_message="Model and card from Hybrid Model Factory")
    except errors.OfflineModeIsEnabled:
        raise HmfError(f"{name}: HF_HUB_OFFLINE is set; unset it, or use --dry-run") from None
    except errors.LocalTokenNotFoundError:
        raise HmfError(f"{name}: there is no Hub token; set HF_TOKEN or run `hf auth login`") from None
    except httpx.TransportError as error:
        raise HmfError(f"{name}: the Hub cannot be reached: {_line(error)}; run the command again") from None
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise HmfError(
            f"{name}: the Hub did not accept the upload: {_line(error)}; check the name and HF_TOKEN"
        ) from None
    except OSError as error:
        raise HmfError(f"{name}: the upload failed: {error.strerror or _line(error)}; run the command again") from None
    return str(address)


def _snapshot(name: str, revision: str | None, kind: str, patterns: list[str] | None) -> Path:
    import httpx
    from huggingface_hub import constants, errors, snapshot_download
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": None, "leave": False})  # None: shown on a terminal only

    label = f"{name}{f'@{revision}' if revision else ''}"
    no_such = f"no such directory, and no {kind} on the Hub" if kind == "model" else f"no {kind} on the Hub"
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
            f"{label}: the {kind} has no revision {revision or 'main'!r}; name a branch, tag or commit"
        ) from None
    except errors.GatedRepoError:
        raise HmfError(
            f"{label}: access to this {kind} is restricted; request access on its page, then set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise HmfError(f"{label}: {no_such} has that name; correct it, or set HF_TOKEN if it is private") from None
    except errors.LocalEntryNotFoundError as error:
        reason = f"the Hub cannot be reached: {_line(error.__cause__)}" if error.__cause__ else "HF_HUB_OFFLINE is set"
        if isinstance(error, errors.IncompleteSnapshotError):
            raise HmfError(
                f"{label}: the Hub's cache holds only a part of it, and {reason}; download the rest while online"
            ) from None
        no_directory = "no such directory, and " if kind == "model" else ""
        raise HmfError(
            f"{label}: {no_directory}not in the Hub's cache ({reason}); correct the name, or download it while online"
        ) from None
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise HmfError(
            f"{label}: the Hub cannot be reached: {_line(error)}; run the command again to continue"
        ) from None
    except OSError as error:
        raise HmfError(
            f"{label}: the download failed: {error.strerror or _line(error)}; run the command again to continue"
        ) from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
