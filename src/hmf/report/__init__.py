# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and model cards."""
