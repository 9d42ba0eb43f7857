"""What the programs of training import before they begin: nothing that takes seconds and may not be needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

WHEN_NEEDED = {"opacus", "torchvision", "sklearn", "scipy", "pandas", "pydicom", "PIL", "matplotlib"}


def imported_with(module: str) -> set[str]:
    """Top-level packages that a fresh process has after importing `module`."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("role", ["hospital", "aggregator"])
def test_a_program_of_training_imports_large_libraries_when_it_needs_them(role: str) -> None:
    imported = imported_with(f"mpc_fl.federation.{role}_program")
    assert "torch" in imported
    assert not WHEN_NEEDED & imported


@pytest.mark.parametrize("role", ["hospital", "aggregator"])
def test_a_role_imports_by_its_task(role: str) -> None:
    assert not {"torch", *WHEN_NEEDED} & imported_with(f"parties.{role}")
