"""Networks of MONAI and timm (examples/own_networks), where they are installed: two rounds on phantoms, an encrypted diagnosis."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installed_package import install

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "own_networks"
REPOSITORY = EXAMPLES.parents[1]


def test_the_files_name_their_package() -> None:
    project = (EXAMPLES / "pyproject.toml").read_text()
    for name in ("monai", "timm"):
        assert f'"{name}_network"' in project and 'name = "own-networks"' in project
        assert f"architecture: {name}_network:resnet" in (EXAMPLES / f"{name}.yaml").read_text()
        assert "site.allow_packages=[own-networks]" in (EXAMPLES / f"{name}.yaml").read_text()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["monai", "timm"])
def test_two_rounds_and_one_encrypted_diagnosis(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}, which is no dependency of this project")
    install(tmp_path / "site", f"{name}_network", (EXAMPLES / f"{name}_network.py").read_text())
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    allowed = ("--set", f"site.allow_packages=[{name}_network]", "--json")

    def mpc_fl(*arguments: object) -> dict[str, object]:
        command = [sys.executable, "-m", "mpc_fl", *map(str, arguments), *allowed]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    trained = mpc_fl("train", EXAMPLES / f"{name}.yaml", "--out", tmp_path / "run")
    assert trained["rounds"] == 2
    model = tmp_path / "run" / "model.safetensors"
    diagnosed = mpc_fl("infer", EXAMPLES / f"{name}.yaml", "--model", model, "--out", tmp_path / "diagnosis")
    assert diagnosed["images"] == 1 and diagnosed["comparison"]["classes_agree"], diagnosed  # type: ignore[index]
