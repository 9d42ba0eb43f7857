"""`mpc-fl export`: what it says, and what it refuses before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from mpc_fl.apps.cli.exporting import export
from mpc_fl.errors import MpcFlError
from tests.support.trained_models import configured, left_by_training

app = typer.Typer()
app.command()(export)


def run(*words: Any) -> tuple[str, MpcFlError | None]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, MpcFlError), repr(result.exception)
    return result.output, result.exception


def bad(*words: Any) -> str:
    output, error = run(*words)
    assert error is not None and str(error).isprintable() and not output
    return str(error)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return left_by_training(tmp_path / "run", configured("rows")).parent


def test_it_says_what_was_written_and_writes_over_nothing(directory: Path) -> None:
    output, error = run(directory)
    assert error is None
    assert "could not be checked" in output and "Loaded anew with torch" in output
    assert f"Written: {directory / 'model.pt2'}" in output and str(directory / "model.pt2.json") in output
    content = (directory / "model.pt2").read_bytes()
    assert "exists already: choose another --out, or give --force" in bad(directory)
    (directory / "model.pt2").unlink()
    assert "model.pt2.json exists already" in bad(directory)
    said = json.loads(run(directory, "--force", "--json")[0])
    assert said["file"] == str(directory / "model.pt2") and said["signed_by_all_parties"] is False
    assert said["largest_difference"] < 1e-4 and len(content) == len((directory / "model.pt2").read_bytes())


def test_what_is_missing_is_said_in_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.safetensors does not exist" in bad(directory.parent)
    (directory / "config.yaml").rename(directory / "kept.yaml")
    assert "there is no config.yaml" in bad(directory)
    assert run(directory, "--config", directory / "kept.yaml")[1] is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = bad(directory, "--format", "onnx")
    assert message == "--format onnx needs onnx, which is not installed: pip install 'mpc-fl[export]'"
    assert not (directory / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_is_exported_as_training_left_it(tmp_path: Path) -> None:
    values = {
        "data": {"image_size": 8, "phantoms": {"train_patients": 24, "test_patients": 12}},
        "training": {"rounds": 1, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
        "privacy": {"mechanism": "none"},
        "federation": {"hospitals": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    def mpc_fl(*words: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mpc_fl", *map(str, words)], capture_output=True, text=True, timeout=280
        )

    trained = mpc_fl("train", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    done = mpc_fl("export", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["signed_by_all_parties"] is True and said["largest_difference"] < 1e-4 and not done.stderr
    # What a hospital has itself is signed, too; its directory has no configuration in a local run.
    party = tmp_path / "run" / "parties" / "hospital-1"
    of_run = ("--config", tmp_path / "run" / "config.yaml", "--authority", tmp_path / "run" / "federation.crt")
    done = mpc_fl("export", party, *of_run, "--json")
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)
    assert own["signed_by_all_parties"] is True and own["model_sha256"] == said["model_sha256"]
