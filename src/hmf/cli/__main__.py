# SPDX-License-Identifier: Apache-2.0
"""`python -m hmf.cli`, for launchers such as torchrun that start modules."""

from hmf.cli import main

if __name__ == "__main__":
    main()
