# SPDX-License-Identifier: Apache-2.0
"""What vLLM imports in each rank's own process (`worker_extension_cls`): kernels are not tuned there either."""

from hmf.bench.doctor import one_variant

_for_good = one_variant()
_for_good.__enter__()


class Untuned:
    """Adds nothing to the worker: its module is what matters."""
