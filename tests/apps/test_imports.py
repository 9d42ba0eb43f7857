"""What each process imports, counted in whole runs and in fresh interpreters: importing is most of what a start costs.

Python itself tells (PYTHONPROFILEIMPORTTIME): a line for each import of each process, forked ones too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpc_fl.apps.runs.party_starter import modules_to_share
from mpc_fl.config.config import parse_config

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 300
# What takes long to import and only some need.
NEVER_HERE = {"IPython", "pandas", "sklearn", "tensorboard"}
FOR_TRAINING = {"opacus", "scipy"}
FOR_FILES = {"pydicom"}  # an image file of that kind, no phantoms
FOR_SHARES_OF_CRYPTEN = {"crypten", "onnx", "sympy", "torch._dynamo", "torch.onnx"}
FOR_REPORTS = {"matplotlib"}
FOR_LARGE_NETWORKS = {"torchvision"}
EVERYTHING = NEVER_HERE | FOR_TRAINING | FOR_FILES | FOR_SHARES_OF_CRYPTEN | FOR_REPORTS | FOR_LARGE_NETWORKS
TINY = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 24, "test_patients": 12}},
    "training": {"rounds": 1, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "federation": {"hospitals": 2},
}
_IMPORT = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)


def imported(*arguments: str) -> set[str]:
    """Modules that an interpreter, or any process that it starts, imports."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = set(_IMPORT.findall(done.stderr))
    assert "encodings" in found
    return found


# ---- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path]:
    """What the processes of a training run import, and the model they make."""
    directory = tmp_path_factory.mktemp("training")
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(TINY))
    found = imported("-m", "mpc_fl", "train", str(config), "--out", str(directory / "run"))
    return found, directory / "run" / "model.safetensors"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("engine", "needed", "absent"),
    [
        ("fast", FOR_REPORTS, EVERYTHING - FOR_REPORTS),
        ("reference", FOR_REPORTS | FOR_SHARES_OF_CRYPTEN, EVERYTHING - FOR_REPORTS - FOR_SHARES_OF_CRYPTEN),
    ],
)
def test_no_process_of_a_diagnosis_imports_more(
    engine: str, needed: set[str], absent: set[str], training: tuple[set[str], Path], tmp_path: Path
) -> None:
    config, (_, model) = tmp_path / "config.yaml", training
    config.write_text(
        yaml.safe_dump({**TINY, "inference": {"engine": engine, "limit": 1, "plaintext_reference": True}})
    )
    found = imported("-m", "mpc_fl", "infer", str(config), "--model", str(model), "--out", str(tmp_path / "run"))
    assert sorted(absent & found) == []
    assert needed & found  # else this test looks for the wrong names


@pytest.mark.slow
@pytest.mark.processes
def test_no_process_of_a_training_run_imports_more(training: tuple[set[str], Path]) -> None:
    found, _ = training
    assert sorted((NEVER_HERE | FOR_FILES | FOR_LARGE_NETWORKS) & found) == []
    assert found >= FOR_REPORTS


# ---- one process -------------------------------------------------------------------------------------------------------


def test_help_imports_no_library_of_numbers() -> None:
    assert not (EVERYTHING | {"torch", "numpy", "cryptography", "ssl", "pydantic"}) & imported("-m", "mpc_fl", "--help")


@pytest.mark.parametrize(
    ("values", "absent"),
    [
        ({"task": "infer", "inference": {"engine": "fast"}}, EVERYTHING),
        pytest.param({"task": "infer"}, EVERYTHING - FOR_SHARES_OF_CRYPTEN, marks=pytest.mark.slow),
        pytest.param({"task": "serve", "inference": {"engine": "fast"}}, EVERYTHING, marks=pytest.mark.slow),
        pytest.param({"task": "train"}, EVERYTHING - FOR_TRAINING - FOR_SHARES_OF_CRYPTEN, marks=pytest.mark.slow),
        ({"task": "train", "privacy": {"mechanism": "none"}}, EVERYTHING - FOR_SHARES_OF_CRYPTEN),
    ],
    ids=["diagnosis-fast", "diagnosis", "service-fast", "training", "training-without-noise"],
)
def test_parties_share_nothing_that_their_task_does_not_need(values: dict[str, Any], absent: set[str]) -> None:
    modules = modules_to_share(parse_config(values, "test"))
    found = imported("-c", f"import {', '.join(modules)}")
    assert sorted(absent & found) == [] and set(modules) <= found


def test_the_fork_server_itself_is_the_standard_library() -> None:
    found = imported("-c", "import mpc_fl.apps.runs.fork_server")
    assert not (EVERYTHING | {"torch", "numpy", "cryptography", "ssl", "pydantic", "typer"}) & found
