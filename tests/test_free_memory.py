"""Memory is given back to the system once nothing is left on its pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks too small for mappings of their own, with one that stays after the last of them: the heap cannot shrink by itself.
_PROGRAM = """
import re, pathlib
from mpc_fl.free_memory import give_back_free_memory
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) >> 10
blocks = [bytearray(b"x") * (60 << 10) for _ in range(3000)]
loop = [blocks]
loop.append(loop)
stays, before = bytearray(b"x") * (60 << 10), held()
del blocks, loop
give_back_free_memory()
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps or returns pages as it likes")
def test_pages_on_which_nothing_is_left_go_back_to_the_system() -> None:
    """Of 176 MB, which only a loop of references held."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) > 150
