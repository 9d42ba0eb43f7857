"""examples/by_hand.sh: keys, certificates and parties as sites would make and start them, one command after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.config.config import party_names
from mpc_fl.config.loading import load_config
from tests.support.harness import free_ports

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_configuration_has_an_address_for_every_party() -> None:
    config = load_config(EXAMPLES / "by_hand.yaml")
    assert list(config.federation.addresses) == party_names(config)
    assert not config.federation.session  # a session is used once, so it is no part of the file


@pytest.mark.processes
@pytest.mark.slow
def test_a_federation_by_hand(tmp_path: Path) -> None:
    """The script as it stands, on free ports: all parties end with one model and one ledger, and no key travelled."""
    values = yaml.safe_load((EXAMPLES / "by_hand.yaml").read_text())
    names = list(values["federation"]["addresses"])
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)}
    values["federation"]["addresses"] = addresses
    config = tmp_path / "federation.yaml"
    config.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        ["bash", EXAMPLES / "by_hand.sh", tmp_path / "sites", config],
        env={**os.environ, "BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("model.safetensors", LEDGER_FILE):
        assert len({(tmp_path / "sites" / name / file).read_bytes() for name in names}) == 1, file
    assert sorted(path.name for path in (tmp_path / "sites" / "returned").rglob("*.key")) == []
