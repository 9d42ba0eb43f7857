"""Sites that differ, each by `mpc-fl party` with a folder of its own: a table of patients, one class, DICOM without a test set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from PIL import Image
from typer.testing import CliRunner

from mpc_fl.apps.cli.commands import app
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.learning.data.dicom_files import INVERTED
from mpc_fl.learning.data.image_files import PADDED, RESIZED
from mpc_fl.learning.data.windows import STORED_BITS, WINDOW
from tests.learning.data.dicom_writing import write_dicom
from tests.support.sites import Sites, require_reported_as_checked, said_by

CLASSES = ("ill", "well")
SIDE = 16
VALUES: dict[str, Any] = {
    "name": "sites",
    "data": {"source": "images", "classes": list(CLASSES), "image_size": SIDE, "wrong_size": "resize"},
    "training": {"rounds": 1, "local_steps": 2, "batch_size": 4},
    "privacy": {"delta": 0.01, "smallest_hospital": 4, "largest_hospital": 40},
}
# What each site's report must say, as `_write_...` write it. Class counts are of ill and well.
EXPECTED: dict[str, dict[str, Any]] = {
    "hospital-0": {
        "patients": {"train": 24, "test": 9},
        "records": {"train": 27, "test": 9},
        "class_counts": {"train": [15, 12], "test": [4, 5]},
        "skipped_files": 0,
        "left_aside": {"index or cache of a program": 1, "no image (.txt)": 1},
        "treatments": {STORED_BITS: 36},
    },
    "hospital-1": {
        "patients": {"train": 9, "test": 3},
        "records": {"train": 9, "test": 3},
        "class_counts": {"train": [9, 0], "test": [3, 0]},
        "skipped_files": 0,
        "left_aside": {},
        "treatments": {STORED_BITS: 12, PADDED: 11, RESIZED: 1},
    },
    "hospital-2": {
        "patients": {"train": 5, "test": 0},
        "records": {"train": 15, "test": 0},
        "class_counts": {"train": [12, 3], "test": [0, 0]},
        "skipped_files": 2,
        "left_aside": {},
        "treatments": {STORED_BITS: 14, WINDOW: 1, INVERTED: 1},
    },
}
SOURCES = {"hospital-0": {"patients.csv": 36}, "hospital-1": {"names of files": 12}, "hospital-2": {"headers": 15}}


def _film(draw: np.random.Generator, name: str, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    film: np.ndarray = draw.normal(80 if name == "ill" else 160, 20, size).clip(0, 255).astype(np.uint8)
    return film


def _write_png(root: Path, draw: np.random.Generator) -> None:
    """Names that say nothing, and a table that says whose they are: the first three ill patients have two films each."""
    rows, number = ["file;patient;sex"], 0
    for split, name, patients in (("train", "ill", 12), ("train", "well", 12), ("test", "ill", 4), ("test", "well", 5)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for patient in range(patients):
            for _ in range(2 if (split, name) == ("train", "ill") and patient < 3 else 1):
                number += 1
                Image.fromarray(_film(draw, name)).save(folder / f"scan ({number}).png")
                rows.append(f"{split}/{name}/scan ({number}).png;{split} {name} {patient};f")
    (root / "patients.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    (root / "train" / "ill" / "Thumbs.db").write_bytes(b"cache")
    (root / "test" / "well" / "remarks.txt").write_text("none")


def _write_one_class(root: Path, draw: np.random.Generator) -> None:
    """JPEG that are not square, but for one of another size, with patients in their names; nobody is well."""
    for split, patients in (("train", 9), ("test", 3)):
        folder = root / split / "ill"
        folder.mkdir(parents=True)
        for patient in range(patients):
            size = (2 * SIDE, 2 * SIDE) if (split, patient) == ("test", 0) else (SIDE + 4, SIDE)
            number = patient + (100 if split == "test" else 0)
            Image.fromarray(_film(draw, "ill", size)).save(folder / f"person{number}_view.jpeg")


def _write_dicom(root: Path, draw: np.random.Generator) -> None:
    """Five patients with three or four files each, one of one more who has nothing readable, and one file of nobody."""
    for name, patients, files in (("ill", 3, 4), ("well", 2, 2)):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(patients * files - (name == "well")):
            tags: dict[str, Any] = {"PatientID": f"{name}-{number % patients}"}
            film = _film(draw, name)
            if (name, number) == ("ill", 1):
                tags["PhotometricInterpretation"], film = "MONOCHROME1", 255 - film
            if (name, number) == ("ill", 2):
                tags |= {"WindowCenter": 128, "WindowWidth": 256}
            write_dicom(folder / f"IM{number:04d}", film, **tags)
    ill = root / "train" / "ill"
    cut = write_dicom(ill / "IM0100", _film(draw, "ill"), PatientID="ill-nothing-readable")
    cut.write_bytes(cut.read_bytes()[:-50])
    (ill / "IM0101.dcm").write_bytes(b"no header at all")


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    """Data and identities of all, one configuration."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    data = {name: tmp_path / name / "data" for name in EXPECTED}
    for write, root in zip((_write_png, _write_one_class, _write_dicom), data.values(), strict=True):
        write(root, np.random.default_rng(0))
    values = {**VALUES, "data": {**VALUES["data"], "most_unreadable": 0.2}}
    return Sites.of(tmp_path, data, values)


def _certificate(sites: Sites, name: str) -> str:
    identity = load_identity(sites.root / name / "identity", name)
    return fingerprint(x509.load_pem_x509_certificate(identity.certificate))


@pytest.mark.processes
@pytest.mark.slow
def test_three_sites_that_differ_train_together_and_report_what_check_said(
    sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = {}
    for name, expected in EXPECTED.items():
        status, said, complained = said_by(capsys, monkeypatch, sites.check(name, "--json"))
        assert status == 0, complained
        checked[name] = json.loads(said)
        assert checked[name]["data"]["patients_from"] == SOURCES[name]
        assert checked[name]["data"]["patients"] == sum(expected["patients"].values())
    rules = sites.root / "rules.yaml"
    rules.write_text(f"privacy: {{largest_epsilon: 8}}\nleaders: ['{_certificate(sites, 'aggregator')}']\n")
    ended = sites.run_all({"hospital-0": ["--set", f"site.rules={rules}"]})
    assert all(done.returncode == 0 for done in ended.values()), {name: done.stderr for name, done in ended.items()}

    for name, expected in EXPECTED.items():
        summary, report = sites.summary(name), sites.report(name)
        assert {key: summary[key] for key in expected} == expected and summary["classes"] == list(CLASSES)
        require_reported_as_checked(summary, checked[name])
        assert (summary["kind"], summary["party"], summary["rounds_made"]) == ("party", name, 1)
        assert (summary["own_accuracy"] is None) == (not expected["records"]["test"])
        assert 0 < summary["privacy"]["epsilon"] <= 8 and summary["final"] is None and summary["openings"] > 0
        trains = expected["patients"]["train"]
        assert (
            f"{name} trains on {trains} patients; {expected['skipped_files']} files cannot be read"
            in ended[name].stderr
        )
        assert f"at {name}" in report and "Not shown" not in report and "all parties on one machine" not in report
        assert "For Patients Records ill well" in report and "of all hospitals, training" not in report
        for part, counts in expected["class_counts"].items():
            numbers = (expected["patients"][part], expected["records"][part], *counts)
            assert f" {part} {' '.join(map(str, numbers))} " in report
        for what, count in (*expected["treatments"].items(), *expected["left_aside"].items()):
            assert f" {what} {count} " in report
        assert ("Skipped files 2 " in report) == (name == "hospital-2")
        assert "nothing-readable" not in report + ended[name].stderr  # a PatientID

    final = sites.summary("aggregator")
    tested = [sum(of["class_counts"]["test"][label] for of in EXPECTED.values()) for label in range(len(CLASSES))]
    assert final["final"]["class_counts"] == tested and final["final"]["records"] == sum(tested) == 12
    assert final["took_part"] == {"0": list(sites.hospitals), "1": list(sites.hospitals)}
    own = ("patients", "records", "class_counts", "treatments", "skipped_files", "left_aside")
    assert all(final[key] is None for key in own)
    report = sites.report("aggregator")
    assert "12 test records of all hospitals" in report and "Not shown" not in report
    for name in sites.names:  # what to do next
        assert f"Model:  {sites.out(name) / 'model.safetensors'}\nReport: " in ended[name].stdout
        assert f"mpc-fl ledger verify {sites.out(name)} --authority federation.crt" in ended[name].stdout
    _require_verified(sites, capsys, monkeypatch)
    _require_made_anew(sites, capsys, monkeypatch)
    _require_compared(sites)
    _require_asked_first(sites, capsys, monkeypatch)


def _require_verified(sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each party's directory by itself: the certificate that the run used lies there."""
    for name in sites.names:
        status, said, complained = said_by(capsys, monkeypatch, ["ledger", "verify", str(sites.out(name))])
        assert status == 0 and "The reveal ledger verifies" in said, said + complained
        assert f"certificate, from {sites.out(name) / ROOT_FILE}: " in said and "It lies with what it verifies" in said


def _require_made_anew(sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sites.names:
        before = sites.report(name)
        (sites.out(name) / "report.html").unlink()
        assert said_by(capsys, monkeypatch, ["report", str(sites.out(name))])[0] == 0
        assert sites.report(name) == before


def _require_compared(sites: Sites) -> None:
    """`mpc-fl compare` reads what each party has, and says nothing that it has not."""
    runs = [str(sites.out(name)) for name in sites.names]
    printed = json.loads(CliRunner().invoke(app, ["compare", *runs, "--json"]).output)
    figures = dict(zip(sites.names, printed["runs"], strict=True))
    assert printed["settings"] == {} and all(of["party"] == name for name, of in figures.items())
    for name, expected in EXPECTED.items():
        of = figures[name]
        assert of["epsilon"] == sites.summary(name)["privacy"]["epsilon"] and of["accuracy"] is None
        assert of["own_test_records"] == expected["records"]["test"]
    of = figures["aggregator"]
    assert of["accuracy"] == sites.summary("aggregator")["final"]["accuracy"] and of["test_records"] == 12
    assert of["epsilon"] is None and of["mechanism"] is None and of["own_accuracy"] is None
    shown = " ".join(CliRunner().invoke(app, ["compare", *runs]).output.split())
    assert "Own accuracy" in shown and "No setting differs" in shown and " none " not in shown


def _require_asked_first(sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run on the same ledger has less budget left, and asks."""
    ledger = ["--set", f"site.privacy_ledger={sites.out('hospital-0')}", "--set", "federation.session=again"]
    again = sites.party("hospital-0", *ledger, "--set", "privacy.epsilon=5")
    status, _, complained = said_by(capsys, monkeypatch, again)
    said = " ".join(complained.split())
    assert status == 6 and "hospital-0: of the privacy ledger epsilon 4.9 of 5 is used" in said, said
    assert "times as much" in said and "--anyway" in said and "listens" not in said


@pytest.mark.processes
@pytest.mark.slow
def test_a_site_does_not_follow_an_aggregator_that_its_rules_do_not_name(sites: Sites) -> None:
    rules = sites.root / "rules.yaml"
    rules.write_text(f"# ours\nleaders: ['{_certificate(sites, 'hospital-0')}']\n")
    ended = sites.run_all({"hospital-1": ["--set", f"site.rules={rules}"]})
    said = " ".join(ended["hospital-1"].stderr.split())
    assert ended["hospital-1"].returncode == 2 and "rules.yaml line 2 (leaders)" in said, said
    assert all(done.returncode != 0 for done in ended.values())
    assert not (sites.out("hospital-1") / "summary.json").exists()
    assert not (sites.out("hospital-1") / "hospital-1-privacy.sqlite3").exists()  # nothing was charged


def test_a_site_refuses_before_it_dials_anybody(
    sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = sites.root / "rules.yaml"
    rules.write_text("tasks: [train]\nprivacy:\n  largest_epsilon: 3\n")

    def refused(arguments: list[str]) -> tuple[int, str]:
        status, said, complained = said_by(capsys, monkeypatch, arguments)
        return status, " ".join((said + complained).split())

    status, said = refused(sites.party("hospital-0", "--set", f"site.rules={rules}"))
    assert status == 2 and "rules.yaml line 3 (privacy.largest_epsilon)" in said, said
    status, said = refused(sites.check("hospital-0", "--set", f"site.rules={rules}"))
    assert status == 2 and "line 3" in said, said
    rules.write_text(f"authorities: ['{'ab' * 32}']\n")
    status, said = refused(sites.party("hospital-0", "--set", f"site.rules={rules}"))
    assert status == 2 and "the authority with certificate" in said, said
    status, said = refused(sites.party("hospital-2", "--set", "federation.smallest_site=7"))
    assert status == 3 and "hospital-2 has fewer training patients than federation.smallest_site, 7" in said, said
    status, said = refused(sites.party("hospital-0", "--set", "data.partition.method=dirichlet"))
    assert status == 2 and "takes its whole folder" in said, said
    (sites.data["hospital-2"] / "train" / "wel").mkdir()
    status, said = refused(sites.party("hospital-2"))
    assert status == 3 and "has a folder 'wel'" in said, said


def test_check_as_a_site_counts_all_that_is_its_own(
    sites: Sites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, of in EXPECTED.items():
        status, out, complained = said_by(capsys, monkeypatch, sites.check(name))
        said = " ".join(out.split())
        assert status == 0, complained
        files, patients = sum(of["records"].values()) + of["skipped_files"], of["patients"]
        assert f"Data: {files} files, {sum(patients.values())} patients, {of['skipped_files']} unreadable." in said, (
            said
        )
        assert f"{name}: {patients['train']} training patients, epsilon" in said
        for part, (ill, well) in of["class_counts"].items():
            assert f"{part}: {of['records'][part]} files of {patients[part]} patients: {ill} ill, {well} well" in said
