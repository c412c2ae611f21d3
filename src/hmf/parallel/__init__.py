# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: rows divided over several processes, and the exchange that each layer type needs."""
