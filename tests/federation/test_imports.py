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


def test_the_programs_of_training_import_large_libraries_when_they_need_them() -> None:
    imported = imported_with("mpc_fl.federation.hospital_program, mpc_fl.federation.aggregator_program")
    assert "torch" in imported
    assert not WHEN_NEEDED & imported


@pytest.mark.parametrize("role", ["hospital", "aggregator"])
def test_a_role_imports_by_its_task(role: str) -> None:
    assert not {"torch", *WHEN_NEEDED} & imported_with(f"parties.{role}")


TRAIN_WITHOUT_PRIVACY = """
import sys, pathlib
from mpc_fl.config.config import parse_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.federation.hospital_state import join
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training.dp_sgd import train_locally

data = {"image_size": 16, "phantoms": {"train_patients": 30, "test_patients": 12}}
training = {"strategy": "fedprox", "proximal": 0.1, "local_steps": 2}
config = parse_config({"data": data, "training": training, "privacy": {"mechanism": "none"}}, "test")
patients, held_out = (load_hospital(config, 0, split) for split in ("train", "test"))
hospital = join(config, 0, patients, held_out, PrivacyLedger(pathlib.Path("none"), "hospital-0"))
assert train_locally(hospital.model, patients, hospital.local_training, 1, Seed.from_system()).method == "plain"
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_training_without_privacy_on_a_small_network_never_imports_them() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN_WITHOUT_PRIVACY], capture_output=True, text=True, check=True)
    assert not WHEN_NEEDED & set(done.stdout.split())
