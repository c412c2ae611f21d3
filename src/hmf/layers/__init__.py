# SPDX-License-Identifier: Apache-2.0
"""Token mixers: projections -> op -> gate -> projection. Each defines its initialisation from attention."""
