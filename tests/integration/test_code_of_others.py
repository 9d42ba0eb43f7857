"""A network and a loader of installed packages through the command line, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installed_package import LOADER, NETWORK, install

pytestmark = [pytest.mark.processes, pytest.mark.slow]
CONFIG = """
data: {source: archive, image_size: 8}
model: {architecture: "someones_network:network"}
training: {rounds: 1, local_steps: 1, batch_size: 8, per_sample_gradients: vmap}
privacy: {smallest_hospital: 20, noise_multiplier: 3.0}
inference: {engine: fast, plaintext_reference: true}
"""


def test_a_run_with_both_and_a_diagnosis(tmp_path: Path) -> None:
    install(tmp_path / "site", "someones_network", NETWORK, "1.2")
    install(tmp_path / "site", "someones_loader", LOADER, "0.9", loader="archive")
    (tmp_path / "here").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).resolve().parents[2])])

    def mpc_fl(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mpc_fl", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path / "here",
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    refused = mpc_fl("check", config, "--set", "site.allow_packages=[someones-network]")
    assert refused.returncode == 2 and "code of the package someones-loader 0.9" in refused.stderr, refused.stderr
    allowed = ("--set", "site.allow_packages=[someones-network, someones-loader]")
    checked = mpc_fl("check", config, *allowed, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["packages"] == {
        "data.source": "someones-loader 0.9",
        "model.architecture": "someones-network 1.2",
    }
    trained = mpc_fl("train", config, *allowed, "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert "allow_packages" not in (tmp_path / "run" / "config.yaml").read_text()
    model = tmp_path / "run" / "model.safetensors"
    asked = ("infer", config, *allowed, "--model", model, "--out", tmp_path / "diagnosis", "--json")
    diagnosed = mpc_fl(*asked, "--images", tmp_path)
    assert diagnosed.returncode == 0, diagnosed.stderr
    assert json.loads(diagnosed.stdout)["comparison"]["classes_agree"]
