# SPDX-License-Identifier: Apache-2.0
"""`python -m hmf.cli`, for launchers that start modules, such as torchrun."""

from hmf.cli import main

if __name__ == "__main__":
    main()
