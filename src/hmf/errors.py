# SPDX-License-Identifier: Apache-2.0
"""The one exception that users see."""


class HmfError(Exception):
    """Bad input, said in one line: the file, the key and the mend. The command line prints it and exits with 2."""
