# SPDX-License-Identifier: Apache-2.0
"""Importing this module registers the Hybrids, exactly as `import hmf` does; published model cards import it."""

import hmf  # noqa: F401
