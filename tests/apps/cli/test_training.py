"""What `check` and `train` say before anything is started, and after a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpc_fl.apps.cli.options import configure
from mpc_fl.apps.cli.preflight import preflight
from mpc_fl.apps.cli.training import _ledgers_end_with_it, check
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, DataError, ModelError, PrivacyBudgetError
from mpc_fl.federation.planning import budget_of
from mpc_fl.inference.fast.kernels.compiled import kernels
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.learning.data.dicom_writing import write_dicom


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"features": {"extractor": "resnet18", "weights": "a" * 64}}, "model": {"architecture": "linear"}},
        {"data": {"channels": 3}, "model": {"architecture": "resnet18", "initial_weights": "a" * 64}},
    ],
)
def test_weights_that_are_not_here_are_missed_before_anything_starts(
    sections: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="mpc-fl model import or mpc-fl model fetch"):
        preflight(parse_config(sections, "test"))


@pytest.mark.parametrize("source", ["phantoms", "breast_cancer"])
def test_data_of_ones_own_are_not_passed_over_in_silence(source: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{source: {source}, classes: [a, b]}}\n")
    assert configure(config, None, data=None).data.source == source
    with pytest.raises(ConfigError, match=f"data.source {source} is embedded, so --data would be passed over"):
        configure(config, None, data=tmp_path)


def folder_of_images(directory: Path, patients: dict[str, dict[str, list[int]]]) -> Config:
    """Grey images named by patient: `patients` by split and class."""
    for split, classes in patients.items():
        for name, numbers in classes.items():
            (directory / split / name).mkdir(parents=True)
            for number in numbers:
                Image.new("L", (8, 8), number).save(directory / split / name / f"person{number}_{name}_1.png")
    return parse_config(
        {
            "data": {"source": "images", "classes": ["a", "b"], "image_size": 8},
            "federation": {"hospitals": 2},
            "privacy": {"mechanism": "none"},
            "site": {"data": str(directory)},
        },
        "test",
    )


def test_a_class_without_a_test_patient_of_its_own_is_named(tmp_path: Path) -> None:
    patients = {"train": {"a": [1, 2], "b": [3, 4]}, "test": {"a": [11, 12], "b": [3, 4]}}
    with pytest.raises(DataError, match="no test patient of class 'b' is left without those that also train"):
        preflight(folder_of_images(tmp_path, patients))


def test_check_says_where_gradients_are_computed_and_refuses_what_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("site: {precision: bfloat16}\n")
    check(config)
    said = capsys.readouterr().out
    assert "Device of hospitals here: cpu, gradients in bfloat16." in said
    assert f"Kernels of encrypted diagnosis here: {kernels()}." in said
    check(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["kernels"]) == ("cpu, gradients in bfloat16", str(kernels()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^site\.device is cuda, and torch"):
        preflight(parse_config({"site": {"device": "cuda"}}, "test"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mpc-fl\[mlflow\]'"):
        preflight(parse_config({"site": {"watch": ["mlflow"]}}, "test"))


def test_check_names_test_patients_that_train_where_they_are_refused(tmp_path: Path) -> None:
    patients = {"train": {"a": [1, 2], "b": [3, 4]}, "test": {"a": [1, 12], "b": [13, 14]}}
    folder_of_images(tmp_path / "data", patients)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {source: images, classes: [a, b], image_size: 8, shared_patients: refuse}\n"
        "privacy: {mechanism: none, smallest_hospital: 1}\nfederation: {hospitals: 2}\n"
    )
    for party in (None, "hospital-0"):
        with pytest.raises(DataError, match="1 of 4 test patients are also training patients by name: person1: "):
            check(config, data=tmp_path / "data", party=party)


def test_check_as_a_hospital_refuses_columns_that_a_party_refuses(tmp_path: Path) -> None:
    rows = "".join(f"p{row},{row},{row % 2}\n" for row in range(40))
    (tmp_path / "table.csv").write_text(f"who,age,label\n{rows}")
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {source: csv, classes: [a, b], table: {patient_column: who, features: 1}}\n"
        "model: {architecture: mlp, hidden: [4]}\nfederation: {hospitals: 2}\n"
        "privacy: {mechanism: none, smallest_hospital: 4}\n"
    )
    check(config, data=tmp_path / "table.csv")  # one file that is divided: its order is that of all
    with pytest.raises(ConfigError, match=r"data\.table\.columns is not set"):
        check(config, data=tmp_path / "table.csv", party="hospital-0")


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ([True] * 4, "8 files, 4 patients, 0 unreadable"),
        ([True, True, True, False], "8 files, 5 patients and single images, 0 unreadable"),
        ([False] * 4, "8 files, 8 images, 0 unreadable"),
    ],
)
def test_patients_who_are_known_are_called_so_where_privacy_is_counted_per_image(
    named: list[bool], known: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two scans of each patient: with all PatientIDs known it said "8 files of 4 images"."""
    folders = [tmp_path / "d" / split / name for split in ("train", "test") for name in ("a", "b")]
    for number, (folder, has_name) in enumerate(zip(folders, named, strict=True)):
        folder.mkdir(parents=True)
        for image in range(2):
            pixels = np.full((8, 8), 40 * image + number, np.uint8)
            write_dicom(folder / f"IM{image}", pixels, PatientID=f"P{number}" if has_name else None)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {source: images, classes: [a, b], image_size: 8, unit: image}\nprivacy: {mechanism: none}\n"
        f"site: {{patient_key: {tmp_path / 'patient.key'}}}\n"
    )
    check(config, data=tmp_path / "d", party="hospital-0")
    said = capsys.readouterr().out
    assert f"Data: {known}." in said and "counted per image, not per patient" in said
    assert ("data.unit=patient would do" in said) == all(named)
    train = sum(1 if has_name else 2 for has_name in named[:2])
    words = known.split(", ")[1].split(" ", 1)[1]
    assert f"train: 4 files of {train} {words}: 2 a, 2 b" in said
    assert f"hospital-0: {train} training {words}, no" in said


def test_check_is_for_who_has_data(tmp_path: Path) -> None:
    """As the aggregator it counted a folder as if that were a hospital's."""
    patients = {
        split: {"a": [start, start + 1], "b": [start + 2, start + 3]} for split, start in (("train", 1), ("test", 11))
    }
    folder_of_images(tmp_path / "data", patients)
    config = tmp_path / "config.yaml"
    config.write_text("data: {source: images, classes: [a, b], image_size: 8}\nprivacy: {mechanism: none}\n")
    with pytest.raises(
        ConfigError, match="aggregator has no data that could be checked: give --party the name of a hosp"
    ):
        check(config, data=tmp_path / "data", party="aggregator")
    with pytest.raises(ConfigError, match="there is no party 'agregator' in this task"):
        check(config, data=tmp_path / "data", party="agregator")


def test_check_counts_before_it_refuses_what_the_counts_forbid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is told that a hospital has fewer patients than `privacy.smallest_hospital` needs to know how many it has."""
    patients = {
        split: {"a": [start, start + 1, start + 2], "b": [start + 3, start + 4]}
        for split, start in (("train", 1), ("test", 11))
    }
    folder_of_images(tmp_path / "data", patients)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {source: images, classes: [a, b], image_size: 8}\nfederation: {hospitals: 2}\n"
        "privacy: {smallest_hospital: 800, delta: 0.0001}\n"
    )
    with pytest.raises(
        PrivacyBudgetError, match="fewer patients than privacy.smallest_hospital, 800: lower that bound"
    ):
        check(config, data=tmp_path / "data")
    said = capsys.readouterr().out
    assert said.startswith("Data: 10 files, 10 patients, 0 unreadable.\n") and "train: 5 files of 5 patients" in said
    assert "divided over 2 hospitals: each trains on 2 to 3 patients" in said and "can work" not in said
    with pytest.raises(PrivacyBudgetError):
        check(config, data=tmp_path / "data", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"] and sorted(answer["data"]["training_patients"]) == [2, 3]


def test_check_refuses_what_the_site_does_not_allow_before_it_reads_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, rules = tmp_path / "config.yaml", tmp_path / "rules.yaml"
    config.write_text("data: {source: images, classes: [a, b]}\n")
    rules.write_text("models: [linear]\nprivacy: {largest_epsilon: 1}\n")
    with pytest.raises(ConfigError, match=r"line 1 \(models\); nor privacy.epsilon 8: .* line 2"):
        check(config, data=tmp_path / "absent", overrides=[f"site.rules={rules}"])
    assert capsys.readouterr().out == ""


def test_check_on_a_ledger_shows_the_noise_that_the_run_will_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said two noise multipliers of one run: that of an empty ledger, and that of this one."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {phantoms: {train_patients: 60, test_patients: 20}, image_size: 8}\nmodel: {architecture: mlp, hidden: [2]}\n"
        "training: {rounds: 2, local_steps: 1, batch_size: 4}\nfederation: {hospitals: 2}\n"
        "privacy: {delta: 0.001, accountant: rdp}\n"
    )
    settings = configure(config, None)
    event, ledgers = SubsampledGaussian(2.0, 0.1, 10), tmp_path / "ledgers"
    ledgers.mkdir()
    PrivacyLedger(ledgers / "hospital-1-privacy.sqlite3", "hospital-1").charge(
        event, run="earlier", round_number=1, budget=budget_of(settings)
    )
    check(config, ledger=ledgers)
    lines = capsys.readouterr().out.splitlines()
    of_one, of_other = ([line for line in lines if line.startswith(f"hospital-{rank}:")] for rank in (1, 0))
    assert of_one[0] == "hospital-1: 30 training patients" and "is left; the noise multiplier is" in of_one[1]
    assert len(of_other) == 1 and "with noise multiplier" in of_other[0]


def test_a_ledger_that_the_configuration_names_outlives_the_run() -> None:
    """Only --ledger counted, so that a run on a ledger of its site said there was none."""
    assert _ledgers_end_with_it(Config())
    assert not _ledgers_end_with_it(Config().with_values(site={"privacy_ledger": "ledgers"}))
    assert not _ledgers_end_with_it(Config().with_values(privacy={"mechanism": "none"}))
