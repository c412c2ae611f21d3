# SPDX-License-Identifier: Apache-2.0
"""Processes that compile and run GPU kernels side by side. Imports nothing that takes time."""

from __future__ import annotations

import ctypes
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def prepare() -> BaseContext:
    """The context of a pool whose workers start with the imports of `hmf doctor` done.

    A process that has used CUDA cannot be forked, so they are forked from one that only imports. It begins at once and
    does not wait to be asked for a worker, so that the caller can import what it needs meanwhile.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.bench.doctor"])
    forkserver.ensure_running()
    return context


def head_start() -> None:
    """`prepare` early where there is a driver of NVIDIA GPUs; whether PyTorch sees a GPU takes seconds to find out."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    prepare()
