# SPDX-License-Identifier: Apache-2.0
"""Worker processes that compile and run GPU kernels in parallel. This module's imports are fast."""

from __future__ import annotations

import ctypes
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def prepare() -> BaseContext:
    """The context of a pool whose workers have the imports of `hmf doctor` already.

    A process that has used CUDA cannot be forked, so they are forked from one that only imports. It begins at once and
    does not wait to be asked for a worker, so that the caller can import what it needs meanwhile.
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
