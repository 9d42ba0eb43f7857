"""Sites that differ, each by `mpc-fl party` with a folder of its own: one class, DICOM, five patients and no test set."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from PIL import Image

from mpc_fl.apps.cli import main as cli
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import fingerprint
from tests.learning.data.dicom_writing import write_dicom
from tests.support.harness import free_ports

NAMES = ["hospital-0", "hospital-1", "hospital-2", "aggregator"]
# Patients of the classes ill and well in training and test, with one picture each; the second writes DICOM.
SITES = {"hospital-0": ((12, 12), (4, 5)), "hospital-1": ((9, 0), (3, 0)), "hospital-2": ((3, 2), (0, 0))}
VALUES: dict[str, Any] = {
    "name": "sites",
    "data": {"source": "images", "classes": ["ill", "well"], "image_size": 16},
    "training": {"rounds": 1, "local_steps": 2, "batch_size": 4},
    "privacy": {"delta": 0.01, "smallest_hospital": 4, "largest_hospital": 40},
}


def _write_site(root: Path, site: str) -> None:
    draw = np.random.default_rng(0)
    for split, counts in zip(("train", "test"), SITES[site], strict=True):
        for name, count in zip(("ill", "well"), counts, strict=True):
            folder = root / split / name
            for number in range(count):
                folder.mkdir(parents=True, exist_ok=True)
                mean = 80 if name == "ill" else 160
                picture = draw.normal(mean, 20, (16, 16)).clip(0, 255).astype(np.uint8)
                if site == "hospital-1":
                    write_dicom(folder / f"IM{number}", picture, PatientID=f"{split}-{name}-{number}")
                else:
                    number += 100 * (name == "ill") + 1000 * (split == "test")
                    Image.fromarray(picture).save(folder / f"person{number}_1.png")


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data and identities of all, one configuration."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for site in SITES:
        _write_site(tmp_path / site / "data", site)
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(NAMES, free_ports(4), strict=True)}
    values = {**VALUES, "federation": {"hospitals": 3, "session": "sites", "addresses": addresses}}
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(values))
    make_local_identities(NAMES, {name: tmp_path / name / "identity" for name in NAMES})
    return tmp_path


def _arguments(root: Path, name: str, *more: str) -> list[str]:
    own = root / name
    given = ["party", name, "--config", str(root / "federation.yaml"), "--identity", str(own / "identity")]
    data = ["--data", str(own / "data")] if name in SITES else []
    return [*given, "--out", str(own / "out"), *data, *more]


def _said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, complained = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said + complained).split())


def _run_all(root: Path, more: dict[str, list[str]]) -> dict[str, subprocess.CompletedProcess[str]]:
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "mpc_fl", *_arguments(root, name, *more.get(name, []))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in NAMES
    }
    ended = {}
    for name, process in started.items():
        said = process.communicate(timeout=200)
        ended[name] = subprocess.CompletedProcess(process.args, process.returncode, *said)
    return ended


def _certificate(root: Path, name: str) -> str:
    return fingerprint(x509.load_pem_x509_certificate(load_identity(root / name / "identity", name).certificate))


@pytest.mark.processes
@pytest.mark.slow
def test_three_sites_that_differ_train_together(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = federation / "hospital-0" / "rules.yaml"
    rules.write_text(f"privacy: {{largest_epsilon: 8}}\nleaders: ['{_certificate(federation, 'aggregator')}']\n")
    ended = _run_all(federation, {"hospital-0": ["--set", f"site.rules={rules}"]})
    assert all(done.returncode == 0 for done in ended.values()), {name: done.stderr for name, done in ended.items()}
    summaries = {name: json.loads((federation / name / "out" / "summary.json").read_text()) for name in NAMES}
    for name, (train, test) in SITES.items():
        of, count = summaries[name], {"train": sum(train), "test": sum(test)}
        assert (of["kind"], of["party"], of["patients"], of["records"]) == ("party", name, count, count)
        assert sum(of["treatments"].values()) == sum(train) + sum(test) and of["rounds_made"] == 1
        assert (of["own_accuracy"] is None) == (not sum(test))
        assert 0 < of["privacy"]["epsilon"] <= 8 and of["final"] is None and of["openings"] > 0
        assert f"{name} has {sum(train)} training patients" in ended[name].stderr
        report = federation / name / "out" / "report.html"
        text = re.sub("<[^>]+>", " ", report.read_text())
        assert f"at {name}" in text and "Not shown" not in text and "all parties on one machine" not in text
        report.unlink()
        assert _said(capsys, monkeypatch, "report", str(report.parent))[0] == 0 and report.is_file()
    final = summaries["aggregator"]["final"]
    assert final["class_counts"] == [4 + 3, 5] and summaries["aggregator"]["patients"] is None
    assert summaries["aggregator"]["took_part"] == {"0": NAMES[:3], "1": NAMES[:3]}
    text = re.sub("<[^>]+>", " ", (federation / "aggregator" / "out" / "report.html").read_text())
    assert "12 test records of all hospitals" in text and "Not shown" not in text

    # Another run on the same ledger has less budget left, and asks first.
    ledger = ["--set", f"site.privacy_ledger={federation / 'hospital-0' / 'out'}", "--set", "federation.session=again"]
    status, said = _said(
        capsys, monkeypatch, *_arguments(federation, "hospital-0", *ledger, "--set", "privacy.epsilon=5")
    )
    assert status == 6 and "hospital-0: of the privacy ledger epsilon 4.9 of 5 is used" in said, said
    assert "times as much" in said and "--anyway" in said and "listens" not in said


@pytest.mark.processes
@pytest.mark.slow
def test_a_site_does_not_follow_an_aggregator_that_its_rules_do_not_name(federation: Path) -> None:
    rules = federation / "hospital-1" / "rules.yaml"
    rules.write_text(f"# ours\nleaders: ['{_certificate(federation, 'hospital-0')}']\n")
    ended = _run_all(federation, {"hospital-1": ["--set", f"site.rules={rules}"]})
    said = " ".join(ended["hospital-1"].stderr.split())
    assert ended["hospital-1"].returncode == 2 and "rules.yaml line 2 (leaders)" in said, said
    assert all(done.returncode != 0 for done in ended.values())
    assert not (federation / "hospital-1" / "out" / "summary.json").exists()
    assert not (federation / "hospital-1" / "out" / "hospital-1-privacy.sqlite3").exists()  # nothing was charged


def test_a_site_refuses_before_it_dials_anybody(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = federation / "rules.yaml"
    rules.write_text("tasks: [train]\nprivacy:\n  largest_epsilon: 3\n")

    def refused(name: str, *more: str) -> tuple[int, str]:
        return _said(capsys, monkeypatch, *_arguments(federation, name, *more))

    status, said = refused("hospital-0", "--set", f"site.rules={rules}")
    assert status == 2 and "rules.yaml line 3 (privacy.largest_epsilon)" in said, said
    check = ["check", str(federation / "federation.yaml"), "--data", str(federation / "hospital-0" / "data")]
    status, said = _said(capsys, monkeypatch, *check, "--party", "hospital-0", "--set", f"site.rules={rules}")
    assert status == 2 and "line 3" in said, said
    rules.write_text(f"authorities: ['{'ab' * 32}']\n")
    status, said = refused("hospital-0", "--set", f"site.rules={rules}")
    assert status == 2 and "the authority with certificate" in said, said
    status, said = refused("hospital-2", "--set", "federation.smallest_site=6")
    assert status == 3 and "hospital-2 has fewer training patients than federation.smallest_site, 6" in said, said
    status, said = refused("hospital-0", "--set", "data.partition.method=dirichlet")
    assert status == 2 and "takes its whole folder" in said, said
    (federation / "hospital-2" / "data" / "train" / "wel").mkdir()
    status, said = refused("hospital-2")
    assert status == 3 and "has a folder 'wel'" in said, said


def test_check_as_a_site_counts_all_that_is_its_own(
    federation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (train, test) in SITES.items():
        own = ["--data", str(federation / name / "data"), "--party", name]
        status, said = _said(capsys, monkeypatch, "check", str(federation / "federation.yaml"), *own)
        assert status == 0 and f"Data: {sum(train) + sum(test)} files" in said, said
        assert f"{name}: {sum(train)} training patients, epsilon" in said
