"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks of 2 MB, freed but for small ones between them, after a block of 16 MB was freed: glibc's
# habit is to keep them all from then on.
KEEPS = """
import ctypes
from edgehp._memory import keep_little

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

{first}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(16 << 20))
before = resident()
large = []
for _ in range(50):
    block = libc.malloc(2 << 20)
    ctypes.memset(block, 1, 2 << 20)
    large.append(block)
    libc.malloc(100_000)
for block in large:
    libc.free(block)
print(resident() - before)
"""


def grown(first: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", KEEPS.format(first=first)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_blocks_go_back() -> None:
    assert grown("") > 80, "glibc does not keep what is freed: nothing is shown here"
    assert grown("keep_little(1 << 20)") < 10
