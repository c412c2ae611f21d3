# SPDX-License-Identifier: Apache-2.0
"""Table of GPUs: memory, memory bandwidth and peak FLOP/s."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hmf.errors import HmfError, unknown_name

GIB = 2**30
MFU = 0.35  # default of the model FLOPs utilisation in plans; an assumption, not a measurement


@dataclass(frozen=True)
class Device:
    """A device that serving or training is planned for.

    Attributes:
        memory: total bytes as CUDA reports them; vLLM's memory utilisation is a share of this.
        bandwidth: bytes/s, from the data sheet.
        peak: dense bfloat16 FLOP/s, from the data sheet.
        block: the number of tokens in a vLLM cache block is a multiple of this.
        steps: number of steps that vLLM schedules concurrently.
    """

    name: str
    memory: int
    bandwidth: float
    peak: float = 0.0
    block: int = 16
    steps: int = 2

    @property
    def max_num_seqs(self) -> int:
        """vLLM's default for the largest number of concurrent sequences."""
        return 1024 if self.memory >= 70 * GIB else 256


# CUDA reports about 99% of HBM. GDDR6 with ECC stores the error correction in the same memory, which leaves 15/16.
HBM, GDDR_ECC, GDDR = 0.99, 0.99 * 15 / 16, 0.985
# Columns: name on the command line, name in torch.cuda.get_device_name(), GB of memory, the share of it that CUDA
# reports, TB/s, TFLOP/s. The figures are from NVIDIA's data sheets, those of the GeForce from the white paper of its
# architecture. A name that is a part of another name comes after it, since the first match counts.
_TABLE = (
    ("h100-pcie", "H100 PCIe", 80, HBM, 2.0, 756.0),
    ("h100-nvl", "H100 NVL", 94, HBM, 3.9, 835.5),
    ("h100", "H100", 80, HBM, 3.35, 989.4),
    ("h200-nvl", "H200 NVL", 141, HBM, 4.8, 835.5),
    ("h200", "H200", 141, HBM, 4.8, 989.4),
    ("gh200", "GH200", 96, HBM, 4.0, 989.4),
    ("b200", "B200", 180, HBM, 8.0, 2250.0),
    ("a100-40", "A100-SXM4-40GB", 40, HBM, 1.555, 311.9),
    ("a100", "A100", 80, HBM, 2.039, 311.9),
    ("l40s", "L40S", 48, GDDR_ECC, 0.864, 362.1),
    ("l4", "L4", 24, GDDR_ECC, 0.3, 121.0),
    ("a10g", "A10G", 24, GDDR_ECC, 0.6, 70.0),
    ("a10", "A10", 24, GDDR_ECC, 0.6, 125.0),
    ("rtx4090", "RTX 4090", 24, GDDR, 1.008, 165.2),
)
GPUS: dict[str, Device] = {
    name: Device(name, round(size * GIB * visible), terabytes * 1e12, teraflops * 1e12)
    for name, _, size, visible, terabytes, teraflops in _TABLE
}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of the GPU that torch.cuda.get_device_name() names; None for a GPU that the table does not have."""
    for name, cuda_name, *_ in _TABLE:
        if re.search(rf"\b{cuda_name}\b", device_name):
            return GPUS[name].peak
    return None


# Share of the data sheet's bandwidth that a device-to-device copy reaches: 3.01 of 3.35 TB/s on an H100 SXM. Bytes read
# and bytes written are both counted.
COPY_SHARE = 3.01 / 3.35


def parse_gpus(text: str) -> tuple[Device, int]:
    """`"h200x8"` -> (the device h200, 8). Without a count it is one GPU.

    Raises:
        HmfError: an unknown name, or a count of zero.
    """
    text = text.strip().lower()
    match = re.fullmatch(r"(.+)x([0-9]+)", text)
    name, count = (match[1], int(match[2])) if match and match[1] in GPUS else (text, 1)
    if name not in GPUS:
        raise HmfError(f"--gpu: {unknown_name('GPU', name, GPUS)}")
    if count < 1:
        raise HmfError(f"--gpu: {text!r}: at least one GPU is needed; write for example {name}x8")
    return GPUS[name], count


def cpu(memory: int = 0) -> Device:
    """The device of vLLM's CPU build, which schedules one step at a time."""
    return Device("cpu", memory, bandwidth=0.0, block=128, steps=1)


def available(device: str | None) -> str:
    """The device to compute on: `device`; for None "cuda" if there is a GPU, else "cpu". HmfError for a missing GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise HmfError("--device cuda: PyTorch finds no GPU here; leave --device out")
    return device or ("cuda" if has_gpu else "cpu")
