"""Whose groups records are in: read from tables as hospitals write them, never guessed, and never an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.groups import UNKNOWN, GroupsSection
from mpc_fl.learning.data.attributes import (
    Attributes,
    age_in_years,
    attributes_of,
    group_numbers,
    phantom_attributes,
)
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.records import index_of

SECTION = GroupsSection(sex=("female", "male"), age_bands=(18, 65), scanner=("A 1", "B"))


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("45", 45), ("045Y", 45), ("45.9", 45), ("45,9", 45), (" 7 y", 7), ("018M", 1), ("011M", 0), ("010W", 0), ("003D", 0),
        ("", None), ("old", None), ("-4", None), ("131", None), ("130", 130), ("4e1", None), ("1234", None), ("45 to 50", None),
    ],
)  # fmt: skip
def test_ages_are_read_as_tables_and_headers_write_them(text: str, years: int | None) -> None:
    assert age_in_years(text) == years


@given(st.text("0123456789ymwdY.,- ", max_size=8))
def test_no_text_of_an_age_is_an_error(text: str) -> None:
    years = age_in_years(text)
    assert years is None or 0 <= years <= 130


def test_each_record_is_in_one_group_of_each_attribute() -> None:
    known = [
        Attributes("Female", "17", "a 1"),
        Attributes("MALE", "18", "B"),
        Attributes("x", "65", ""),
        Attributes("", "", "C"),
    ]
    found = group_numbers(SECTION.model_copy(update={"site": True}), known, 2, 4)
    assert {name: numbers.tolist() for name, numbers in found.items()} == {
        "sex": [0, 1, 2, 2],
        "age": [0, 1, 2, 3],
        "scanner": [0, 1, 2, 2],
        "site": [2, 2, 2, 2],
    }
    attributes = attributes_of(SECTION, 3)
    assert [of.groups[-1] for of in attributes] == [UNKNOWN] * 3
    assert [len(of.groups) for of in attributes] == [3, 4, 3]
    nothing = group_numbers(SECTION, [], 0, 2)
    assert {name: numbers.tolist() for name, numbers in nothing.items()} == {
        "sex": [2] * 2,
        "age": [3] * 2,
        "scanner": [2] * 2,
    }


def folder(root: Path, rows: list[str], header: str = "file,patient,sex,age,scanner") -> Path:
    for split in ("train", "test"):
        for label in ("well", "ill"):
            for number in range(2):
                path = root / split / label / f"{split}-{label}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 40 * number, dtype=np.uint8)).save(path)
    (root / "patients.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


def of_images(root: Path, groups: dict[str, Any]) -> Config:
    values = {
        "data": {"source": "images", "classes": ["well", "ill"], "image_size": 8},
        "evaluation": {"groups": groups},
        "privacy": {"mechanism": "none"},
        "site": {"data": str(root), "data_of": "hospital"},
    }
    return parse_config(values, "test")


def test_the_table_of_patients_says_sex_age_and_scanner_of_test_images(tmp_path: Path) -> None:
    rows = [f"train-{label}-{number}.png,T{label}{number},,," for label in ("well", "ill") for number in range(2)]
    rows += [
        "test-well-0.png,P0,F,70,A",
        "test-well-1.png,P1,m,,A",
        "test-ill-0.png,P2,f,12,",
        "test-ill-1.png,P3,,40,B",
    ]
    config = of_images(folder(tmp_path, rows), {"sex": ["f", "m"], "age_bands": [18], "scanner": ["A"]})
    tests = load_hospital(config, 0, "test")
    numbers = torch.stack([tests.groups[name] for name in ("sex", "age", "scanner")], dim=1)
    found = dict(zip(tests.names, map(tuple, numbers.tolist()), strict=True))
    assert found == {
        "test-well-0.png": (0, 1, 0),
        "test-well-1.png": (1, 2, 0),
        "test-ill-0.png": (0, 0, 1),
        "test-ill-1.png": (2, 1, 1),
    }
    assert load_hospital(config, 0, "train").groups == {}


def test_without_such_columns_all_are_unknown(tmp_path: Path) -> None:
    rows = [f"{split}-{label}-{number}.png,{split}{label}{number}" for split in ("train", "test")
            for label in ("well", "ill") for number in range(2)]  # fmt: skip
    config = of_images(folder(tmp_path, rows, "file,patient"), {"sex": ["f", "m"]})
    assert load_hospital(config, 0, "test").groups["sex"].tolist() == [2] * 4


def test_columns_of_a_table_form_groups_whether_they_are_features_or_not(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    lines = [f"P{n},{n % 2},{n / 40},{20 + n},{'fm'[n % 2]},{'AB'[n % 2]}" for n in range(60)]
    path.write_text("patient,label,crp,age [years],sex,scanner\n" + "\n".join(lines) + "\n")
    columns = [{"name": "crp"}, {"name": "age", "unit": "years", "range": [0, 120]}]
    table = {"patient_column": "patient", "columns": columns}
    values = {
        "data": {"source": "csv", "classes": ["0", "1"], "table": table},
        "model": {"architecture": "linear"},
        "evaluation": {"groups": {"sex": ["f", "m"], "age_bands": [40, 60], "scanner": ["B"]}},
        "privacy": {"mechanism": "none"},
        "site": {"data": str(path), "data_of": "hospital"},
    }
    tests = load_hospital(parse_config(values, "test"), 0, "test")
    assert tests.inputs.shape[1] == 2 and len(tests) > 5
    assert torch.equal(tests.groups["sex"], tests.labels)
    assert torch.equal(tests.groups["scanner"], 1 - tests.labels)
    ages = [20 + int(name.rpartition(" ")[2]) - 2 for name in tests.names]  # the header is line 1
    assert tests.groups["age"].tolist() == [int(age >= 40) + int(age >= 60) for age in ages]


def test_phantoms_have_attributes_of_their_own_that_change_no_image() -> None:
    plain = parse_config({"data": {"image_size": 8, "phantoms": {"train_patients": 9, "test_patients": 200}}}, "test")
    grouped = plain.with_values(evaluation={"groups": SECTION.model_dump()})
    first, second = index_of(plain, "test"), index_of(grouped, "test")
    assert first.arrays is not None and second.arrays is not None and np.array_equal(first.arrays, second.arrays)
    assert first.attributes == [] and len(second.attributes) == len(second.patients)
    by_patient: dict[str, set[Attributes]] = {}
    for patient, of in zip(second.patients, second.attributes, strict=True):
        by_patient.setdefault(patient, set()).add(of)
    assert all(len(of) == 1 for of in by_patient.values())
    assert {of.sex for of in second.attributes} == {"", "female", "male"}
    assert phantom_attributes(SECTION, [0, 1, 1], 3, "test") == phantom_attributes(SECTION, [0, 1, 1], 3, "test")
    assert phantom_attributes(SECTION, [], 3, "test") == []
