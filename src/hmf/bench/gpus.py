# SPDX-License-Identifier: Apache-2.0
"""Memory and bandwidth of devices, for plans made without one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hmf.errors import HmfError, unknown_name

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory: bytes that CUDA reports as total, of which vLLM takes its share; bandwidth: bytes/s on the data sheet;
    block: vLLM's cache blocks hold a multiple of so many tokens; steps: how many vLLM has under way at once."""

    name: str
    memory: int
    bandwidth: float
    block: int = 16
    steps: int = 2

    @property
    def max_num_seqs(self) -> int:
        """vLLM's default number of sequences at once."""
        return 1024 if self.memory >= 70 * GIB else 256


# Bandwidth and size: NVIDIA's data sheets of H100 SXM and NVL, H200 SXM, HGX B200, A100 SXM, L40S, L4, A10G and
# GeForce RTX 4090. CUDA sees about 99% of HBM, and 15/16 of that where GDDR6 keeps its error correction in itself.
HBM, GDDR_ECC, GDDR = 0.99, 0.99 * 15 / 16, 0.985
GPUS: dict[str, Device] = {
    name: Device(name, round(size * GIB * seen), terabytes * 1e12)
    for name, size, seen, terabytes in (
        ("h100", 80, HBM, 3.35),
        ("h100-nvl", 94, HBM, 3.9),
        ("h200", 141, HBM, 4.8),
        ("b200", 180, HBM, 8.0),
        ("a100", 80, HBM, 2.039),
        ("a100-40", 40, HBM, 1.555),
        ("l40s", 48, GDDR_ECC, 0.864),
        ("l4", 24, GDDR_ECC, 0.3),
        ("a10g", 24, GDDR_ECC, 0.6),
        ("rtx4090", 24, GDDR, 1.008),
    )
}

# Of the data sheet's bandwidth, what a device-to-device copy reaches: 3.01 of 3.35 TB/s on an H100 SXM, bytes read and
# written counted alike.
COPY_SHARE = 3.01 / 3.35


def parse_gpus(text: str) -> tuple[Device, int]:
    """`"h200x8"` -> (the row of h200, 8); no count is one GPU. HmfError for an unknown name or a count of zero."""
    text = text.strip().lower()
    match = None if text in GPUS else re.fullmatch(r"(.+)x([0-9]+)", text)
    name, count = (match[1], int(match[2])) if match else (text, 1)
    if name not in GPUS:
        raise HmfError(f"--gpu: {unknown_name('GPU', name, GPUS)}")
    if count < 1:
        raise HmfError(f"--gpu: {text!r}: at least one GPU is needed; write for example {name}x8")
    return GPUS[name], count


def cpu(memory: int = 0) -> Device:
    """vLLM's CPU build, which plans its steps one by one."""
    return Device("cpu", memory, bandwidth=0.0, block=128, steps=1)
