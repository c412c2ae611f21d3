# SPDX-License-Identifier: Apache-2.0
"""Plans of serving and training from configs and recipes: memory, speed, GPU-hours."""
