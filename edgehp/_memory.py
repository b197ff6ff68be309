"""Hand memory that was freed back to the system.

Graphs come and go here in pieces of megabytes, which the C library keeps for later: a process that
holds 150 MiB occupies 330.
"""

from __future__ import annotations

import ctypes
import gc

__all__ = ["give_back"]


def give_back() -> None:
    """Free what only reference cycles hold, and return free memory; takes milliseconds.

    The second with glibc; other C libraries, which have no such call, do as they do.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library None
        return
    trim(0)
