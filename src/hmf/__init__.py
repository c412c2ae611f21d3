# SPDX-License-Identifier: Apache-2.0
"""Turn a pre-trained Transformer into a Hybrid of attention and state-space layers.

Importing the package registers the Hybrid architectures with transformers' Auto classes.
"""

from hmf.model.register import register as _register

__version__ = "0.1.0"

_register()
