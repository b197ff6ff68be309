"""Hand memory that was freed back to the system.

Graphs come and go here in pieces of megabytes, which the C library keeps for later: a process that
holds 150 MiB occupies 330.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

# malloc.h of glibc: M_MMAP_THRESHOLD and M_ARENA_MAX.
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8
_HEAPS = 2
# A camera's frames are larger; what a crop works on is not, and need not be fetched anew each time.
_FRAME = 4 * 1024 * 1024


def keep_little(large: int = _FRAME) -> None:
    """Let the C library keep less of what is freed, from now on and in the whole process.

    glibc gives each thread a heap of its own and, once a large block was freed, keeps blocks of
    that size. Where threads hand blocks to each other, memory then grows with the minutes (by 27 MB
    a minute for `edgehp run`), or its peak depends on how they took turns (a quantisation). Other C
    libraries do as they do. Call it before threads have heaps: those stay.

    Args:
        large: blocks of at least so many bytes go back to the system the moment they are freed,
            and cost a page fault per 4 KiB when they are used again.
    """
    library = _library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, large)
        library.mallopt(_ARENA_MAX, _HEAPS)


def give_back() -> None:
    """Free what only reference cycles hold, and return free memory; takes milliseconds.

    The second with glibc; other C libraries, which have no such call, do as they do.
    """
    gc.collect()
    library = _library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows has no library None
        return None
