"""Three sites whose tables have the same columns in other orders and forms, one with one class: one run, right counts at each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.sites import PARTS, Sites, require_reported_as_checked, said_by

ROWS = 60
CLASSES = ("well", "ill")
COLUMNS = [
    {"name": "age", "range": [0, 120]},
    {"name": "crp", "unit": "mg/l", "range": [0, 500], "censored": "half", "missing": "leave_out"},
    {"name": "sex", "kind": "category", "categories": ["f", "m"], "missing": "indicator"},
    {"name": "größe", "unit": "cm", "range": [40, 220]},
]
# What each site's report must say, as `_tables` writes them: of training and test together, which a hash of the patient parts.
EXPECTED: dict[str, dict[str, Any]] = {
    "hospital-0": {
        "classes": [ROWS // 2, ROWS // 2],
        "left_aside": {},
        "treatments": {
            "read as UTF-8, parted by comma": ROWS,
            "'crp' beyond a limit, half of it": ROWS // 10,
            "without 'sex', marked so": ROWS // 6,
        },
    },
    "hospital-1": {
        "classes": [ROWS // 2 - ROWS // 10, ROWS // 2 - ROWS // 10],
        "left_aside": {"rows without 'crp'": ROWS // 5},
        "treatments": {
            "read as UTF-16-LE, parted by semicolon, with decimal commas": ROWS - ROWS // 5,
            "without 'sex', marked so": ROWS // 6 - ROWS // 30,
        },
    },
    "hospital-2": {
        "classes": [ROWS // 2, 0],
        "left_aside": {},
        "treatments": {
            "read as CP1252, parted by tab, with decimal commas": ROWS // 2,
            "without 'sex', marked so": ROWS // 6,
            "'crp' outside of its range, cut off": 1,
        },
    },
}


def _tables(root: Path) -> dict[str, Path]:
    draw = np.random.default_rng(0)
    first = ["who,age,crp,sex,Größe,label"]
    second = ["Label;SEX;CRP (mg/l);mrn;GRÖSSE (cm);who;Age"]
    third = ["Größe [cm]\tAge\twho\tlabel\tcrp [mg/L]\tsex\tmrn"]
    for row in range(ROWS):
        ill, age, crp, size = row % 2, draw.integers(20, 90), draw.uniform(1, 200), draw.integers(150, 200)
        label, sex, comma = CLASSES[ill], "" if row % 6 == 0 else "fm"[row % 3 == 0], f"{crp:.1f}".replace(".", ",")
        first.append(f"a{row},{age},{'<0.5' if row % 10 == 0 else f'{crp:.1f}'},{sex},{size},{label}")
        second.append(f"{label.upper()};{sex};{'' if row % 5 == 0 else comma};{row};{size};b{row};{age}")
        if not ill:  # two rows a patient, and one value in another unit
            third.append(f"{size}\t{age}\tc{row // 4}\t0\t{'1500,5' if row == 2 else comma}\t{sex}\t{row}")
    paths = {name: root / f"{name}.csv" for name in EXPECTED}
    paths["hospital-0"].write_text("\n".join(first), encoding="utf-8")
    paths["hospital-1"].write_bytes("\r\n".join(second).encode("utf-16"))
    paths["hospital-2"].write_bytes("\r\n".join(third).encode("cp1252"))
    return paths


def _sites(root: Path, table: dict[str, Any]) -> Sites:
    values = {
        "name": "tables",
        "data": {
            "source": "csv",
            "classes": list(CLASSES),
            "partition": {"method": "none"},
            "table": {"patient_column": "who", "identifiers": ["mrn"], **table},
        },
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": 1, "local_steps": 2, "batch_size": 8, "per_sample_gradients": "vmap"},
        "privacy": {"mechanism": "none", "smallest_hospital": 8},
        "runtime": {"connect_timeout": 120},
    }
    return Sites.of(root, _tables(root), values)


@pytest.mark.processes
@pytest.mark.slow
def test_sites_with_columns_in_other_orders_train_one_model_and_report_what_check_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, checked = _sites(tmp_path, {"columns": COLUMNS}), {}
    for name in EXPECTED:
        status, said, complained = said_by(capsys, monkeypatch, sites.check(name, "--json"))
        assert status == 0, complained
        checked[name] = json.loads(said)
    ended = sites.run_all()
    assert all(done.returncode == 0 for done in ended.values()), {name: done.stderr for name, done in ended.items()}
    assert len({(sites.out(name) / "model.safetensors").read_bytes() for name in sites.names}) == 1
    tested = [0, 0]
    for name, expected in EXPECTED.items():
        summary, report = sites.summary(name), sites.report(name)
        require_reported_as_checked(summary, checked[name])
        counts = summary["class_counts"]
        assert [sum(counts[part][label] for part in PARTS) for label in (0, 1)] == expected["classes"]
        assert summary["left_aside"] == expected["left_aside"] and summary["skipped_files"] == 0
        assert summary["treatments"] == expected["treatments"]
        patients = 15 if name == "hospital-2" else sum(expected["classes"])
        assert sum(summary["patients"].values()) == patients
        assert "Not shown" not in report and "For Patients Records well ill" in report
        for part in PARTS:
            numbers = (summary["patients"][part], summary["records"][part], *counts[part])
            assert f" {part} {' '.join(map(str, numbers))} " in report
        for what, count in (*expected["treatments"].items(), *expected["left_aside"].items()):
            assert f" {what} {count} " in report
        tested = [total + count for total, count in zip(tested, counts["test"], strict=True)]
    final = sites.summary("aggregator")
    assert final["final"]["class_counts"] == tested and final["final"]["records"] == sum(tested)
    assert f"{sum(tested)} test records of all hospitals" in sites.report("aggregator")


@pytest.mark.processes
def test_a_site_whose_columns_nobody_named_is_refused_before_it_dials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = _sites(tmp_path, {"features": 3, "identifiers": []})
    arguments = sites.party("hospital-0", "--set", "data.partition.method=equal")
    status, _, complained = said_by(capsys, monkeypatch, arguments)
    assert status == 2 and "data.table.columns is not set" in complained
    assert not sites.out("hospital-0").exists()
