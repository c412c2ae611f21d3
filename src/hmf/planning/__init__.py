# SPDX-License-Identifier: Apache-2.0
"""What serving and training will take, from configs and recipes alone: memory, speed, GPU-hours."""
