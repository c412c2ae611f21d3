# SPDX-License-Identifier: Apache-2.0
"""The import path that published model cards use."""
