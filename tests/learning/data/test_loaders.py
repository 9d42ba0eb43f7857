"""Loaders of installed packages: found by name, allowed by the site, and held to what they promise."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.loaders import loader_package
from mpc_fl.learning.data.loading import load_hospital, load_images, patients_per_hospital, shared_patients
from tests.support.installed_package import LOADER, install


def config_of(source: str, **changes: dict[str, Any]) -> Config:
    data = {"source": source, "image_size": 8, **changes.pop("data", {})}
    values = {"data": data, "privacy": {"smallest_hospital": 20}, "site": {"allow_packages": [source]}, **changes}
    return Config().with_values(**values)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"loader_{zlib.crc32(request.node.name.encode())}"
    monkeypatch.syspath_prepend(
        install(tmp_path / "packages", name, getattr(request, "param", LOADER), "0.7", loader=name)
    )
    return name


def test_its_patients_are_divided_over_hospitals(source: str) -> None:
    config = config_of(source)
    assert str(loader_package(config)) == f"{source.replace('_', '-')} 0.7" and loader_package(Config()) is None
    assert patients_per_hospital(config) == [30, 30, 30]
    own = load_hospital(config, 1, "train")
    assert own.inputs.shape == (30, 1, 8, 8) and own.inputs.dtype == torch.float32 and own.patient_count == 30
    assert torch.allclose(own.inputs.mean((1, 2, 3)), 0.5 * (1 + own.labels) / 3)
    assert len(load_images(None, config, 4)) == 4 and len(load_images(Path("anywhere"), config, None)) == 30


def test_the_path_reaches_it_and_so_do_rows_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = """
import numpy as np
def load(path, split, input_shape, classes):
    assert str(path) == "/archive" and input_shape == (2,) and classes == ("well", "ill"), (path, input_shape, classes)
    labels = np.arange(40) % 2
    return {"records": np.array([[9.0, -9.0]] * 40, dtype=np.float32), "labels": labels.astype(np.int64),
            "patients": [f"{split} {row // 2}" for row in range(40)], "names": [f"row {row}" for row in range(40)]}
"""
    monkeypatch.syspath_prepend(install(tmp_path, "loader_of_rows", rows, loader="rows"))
    config = config_of(
        "rows",
        data={"classes": ["well", "ill"], "table": {"features": 2}},
        model={"architecture": "mlp"},
        site={"allow_packages": ["loader-of-rows"], "data": "/archive"},
    )
    assert config.data.is_table and config.data.input_shape == (2,)
    own = load_hospital(config, 0, "train")
    assert own.inputs[0].tolist() == pytest.approx([2.3026, -2.3026], abs=1e-4) and own.names[0].startswith("row ")
    assert len(own) == 2 * own.patient_count


def test_a_patient_of_both_splits_is_treated_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LOADER.replace('f"{split}-{i}"', 'str(i) if i < 10 else f"{split}-{i}"')
    monkeypatch.syspath_prepend(install(tmp_path, "loader_of_both", source, loader="both"))
    site = {"allow_packages": ["loader_of_both"]}
    config = config_of("both", site=site)
    assert len(shared_patients(config).names) == 10
    assert sum(len(load_hospital(config, rank, "test")) for rank in range(3)) == 20
    with pytest.raises(DataError, match="10 of 30 test patients are also training patients"):
        load_hospital(config_of("both", site=site, data={"shared_patients": "refuse"}), 0, "test")
    keep = config_of("both", site=site, data={"shared_patients": "keep"})
    assert sum(len(load_hospital(keep, rank, "test")) for rank in range(3)) == 30


def broken(of: str, by: str) -> str:
    assert of in LOADER
    return LOADER.replace(of, by)


BROKEN = {
    broken(
        "    count = 90", "    raise OSError('no archive')\n    count = 90"
    ): "raised OSError on the train records: no archive",
    broken('"labels": labels, ', ""): "gives no mapping with records, labels and patients",
    broken(
        "records.astype(np.float32)", "records.astype(np.float64)"
    ): r"gives records float64 \(90, 1, 8, 8\), not float32 \(N, 1, 8, 8\)",
    broken("records.astype(np.float32)", "records[:, :, 1:]"): r"gives records float\d\d \(90, 1, 7, 8\)",
    broken(
        "records.astype(np.float32)", "np.full_like(records, np.nan, dtype=np.float32)"
    ): "values that are not finite",
    broken("records.astype(np.float32)", "(records + 1).astype(np.float32)"): "images with values outside of 0 to 1",
    broken("dtype=np.int64", "dtype=np.int32"): r"gives labels int32 \(90,\), not int64",
    broken("% len(classes)", "% 4"): "labels from 0 to 3, 3 are configured",
    broken("labels.reshape(-1", "(labels := labels - 1).reshape(-1"): "labels from -1 to 1",
    broken('f"{split}-{i}" for', "'' for"): "gives patients that are not short texts",
    broken('f"{split}-{i}" for', "i for"): "gives patients that are not short texts",
    broken("for i in range(count)]", "for i in range(count - 1)]"): "gives no list of 90 patients",
}


@pytest.mark.parametrize(("source", "said"), list(BROKEN.items()), indirect=["source"], ids=range(len(BROKEN)))
def test_what_breaks_the_contract_is_named_with_its_package(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as refused:
        load_hospital(config_of(source), 0, "train")
    assert f"the loader '{source}' of {source.replace('_', '-')} 0.7 " in str(refused.value)
    assert "\n" not in str(refused.value) and refused.value.for_peers == "its data cannot be used"


def test_a_name_that_nobody_announces_and_a_site_that_does_not_allow_it(source: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data.source 'imagse' is none of this program's.*nearest known name is 'images'"
    ):
        load_hospital(config_of("imagse"), 0, "train")
    with pytest.raises(ConfigError, match="which this site does not allow"):
        load_hospital(config_of(source, site={"allow_packages": []}), 0, "train")
