# SPDX-License-Identifier: Apache-2.0
"""Worker processes that compile and run GPU kernels in parallel. This module's imports are fast."""

from __future__ import annotations

import ctypes
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def prepare() -> BaseContext:
    """The context of a pool whose workers start with the imports of `hmf doctor`.

    A process that has used CUDA cannot be forked, so workers are forked from a process that only imports. This process
    starts at once, so that the caller can do its own imports in the meantime.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.bench.doctor"])
    forkserver.ensure_running()
    return context


def head_start() -> None:
    """Call `prepare` early if there is an NVIDIA driver. Asking PyTorch for a GPU would take seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    prepare()
