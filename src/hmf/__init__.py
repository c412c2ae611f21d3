# SPDX-License-Identifier: Apache-2.0
"""Turn a pre-trained Transformer into a Hybrid of attention and state-space layers.

Importing the package registers the Hybrid architectures with transformers' Auto classes. transformers takes seconds to
import. If it is not imported yet, the registration therefore waits until it is, so that `hmf --help` is fast.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"


def _register() -> None:
    importlib.import_module("hmf.model.register").register()


class _AfterTransformers(MetaPathFinder):
    """Finds transformers with the other finders, and registers the Hybrids after its module has been executed."""

    def find_spec(self, name, path, target=None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
