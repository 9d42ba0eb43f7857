"""Two sites whose tables have the same columns in other orders and forms: one run of `mpc-fl party`, right counts at each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mpc_fl.crypto.authority import make_local_identities
from tests.support.harness import free_ports

NAMES = ("hospital-0", "hospital-1", "aggregator")
ROWS = 60
COLUMNS = [
    {"name": "age", "range": [0, 120]},
    {"name": "crp", "unit": "mg/l", "range": [0, 500], "censored": "half", "missing": "leave_out"},
    {"name": "sex", "kind": "category", "categories": ["f", "m"], "missing": "indicator"},
]


def _tables(root: Path) -> dict[str, Path]:
    draw = np.random.default_rng(0)
    first, second = ["who,age,crp,sex,label"], ["Label;SEX;CRP (mg/l);mrn;who;Age"]
    for row in range(ROWS):
        ill, age, crp = row % 2, draw.integers(20, 90), draw.uniform(1, 200)
        label, sex = ("well", "ill")[ill], "" if row % 6 == 0 else "fm"[row % 3 == 0]
        first.append(f"a{row},{age},{'<0.5' if row % 10 == 0 else f'{crp:.1f}'},{sex},{label}")
        second.append(
            f"{label.upper()};{sex};{'' if row % 5 == 0 else f'{crp:.1f}'.replace('.', ',')};{row};b{row};{age}"
        )
    (root / "first.csv").write_text("\n".join(first))
    (root / "second.csv").write_bytes("\r\n".join(second).encode("utf-16"))
    return {"hospital-0": root / "first.csv", "hospital-1": root / "second.csv"}


def _configuration(root: Path, table: dict[str, Any]) -> Path:
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    config = {
        "name": "tables",
        "data": {
            "source": "csv",
            "classes": ["well", "ill"],
            "partition": {"method": "none"},
            "table": {"patient_column": "who", "identifiers": ["mrn"], **table},
        },
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": 1, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
        "privacy": {"mechanism": "none", "smallest_hospital": 20},
        "runtime": {"connect_timeout": 120},
        "federation": {
            "hospitals": 2,
            "session": f"tables-{root.name}",
            "addresses": {name: f"127.0.0.1:{port}" for name, port in ports.items()},
        },
    }
    path = root / "federation.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _party(name: str, path: Path, data: Path | None, *more: str) -> subprocess.Popen[str]:
    role, _, rank = name.partition("-")
    command = [sys.executable, "-m", "mpc_fl", "party", role, *(["--rank", rank] if rank else [])]
    command += ["--config", str(path), "--out", str(path.parent / name), *more]
    command += ["--identity", str(path.parent / name / "identity"), *(["--data", str(data)] if data else [])]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.processes
@pytest.mark.slow
def test_sites_with_columns_in_other_orders_train_one_model(tmp_path: Path) -> None:
    tables, path = _tables(tmp_path), _configuration(tmp_path, {"columns": COLUMNS})
    make_local_identities(NAMES, {name: tmp_path / name / "identity" for name in NAMES})
    parties = {name: _party(name, path, tables.get(name)) for name in NAMES}
    said = {}
    try:
        for name, party in parties.items():
            said[name] = party.communicate(timeout=300)[0]
    finally:
        for party in parties.values():
            party.kill()
            party.wait(timeout=30)
    assert all(party.returncode == 0 for party in parties.values()), said
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in NAMES}) == 1
    treatments = {}
    for name in tables:
        metrics = (tmp_path / name / "metrics.jsonl").read_text()
        treatments[name] = json.loads(metrics.splitlines()[-1])["treatments"]
    assert treatments["hospital-0"] == {
        "read as UTF-8, parted by comma": ROWS,
        "'crp' beyond a limit, half of it": ROWS // 10,
        "without 'sex', marked so": ROWS // 6,
    }
    assert treatments["hospital-1"] == {
        "read as UTF-16-LE, parted by semicolon, with decimal commas": ROWS - ROWS // 5,
        "without 'sex', marked so": ROWS // 6 - ROWS // 30,
    }


@pytest.mark.processes
def test_a_site_whose_columns_nobody_named_is_refused_before_it_dials(tmp_path: Path) -> None:
    tables, path = _tables(tmp_path), _configuration(tmp_path, {"features": 3})
    party = _party("hospital-0", path, tables["hospital-0"], "--set", "data.partition.method=equal")
    said = party.communicate(timeout=120)[0]
    assert party.returncode == 2 and "data.table.columns is not set" in said
    assert not (tmp_path / "hospital-0").exists()
