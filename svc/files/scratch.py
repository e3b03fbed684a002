"""Temporary files for data that does not fit into memory.

They have no name, so the system deletes them even after a crash.
"""

import os
import tempfile
import weakref
from typing import BinaryIO, cast


def scratch_file(owner: object) -> BinaryIO:
    """Open a new temporary file without a name, in `$TMPDIR` or else /var/tmp, because /tmp is held in memory on many
    machines.

    Args:
        owner: object whose garbage collection closes the file.
    """
    usual = "/var/tmp"  # noqa: S108 - the file has no name
    folder = None if "TMPDIR" in os.environ or not os.access(usual, os.W_OK) else usual
    file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 - closed with its owner
    weakref.finalize(owner, file.close)
    return file
