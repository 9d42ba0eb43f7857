"""The compiled kernels as tests find them: the library, the instruction sets to try, and why there may be none."""

from __future__ import annotations

import os

import pytest

from mpc_fl.inference.fast.kernels import compiled

LIBRARY, WHY_NOT = compiled._load(compiled._LIBRARY)
_WANTED = os.environ.get(compiled.VARIABLE, "").removeprefix("off")  # a set that was never tried is tested by its name
SETS = [] if LIBRARY is None else compiled.instruction_sets(LIBRARY, _WANTED)
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernels here: {WHY_NOT}")
