# SPDX-License-Identifier: Apache-2.0
"""Token mixers: projections -> op -> gate -> projection, each with its own start from attention."""
