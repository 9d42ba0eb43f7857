"""A model is exported with all that stands around it: loaded by programs without mpc-fl it says what mpc-fl says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer

from mpc_fl.apps.runs import export_check, export_formats, exporting
from mpc_fl.apps.runs.exporting import Order, export
from mpc_fl.apps.runs.model_card_file import card_of
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.learning.data.image_files import ImageForm, read_image
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.data.tables import read_breast_cancer, read_csv
from mpc_fl.learning.models.whole_network import TrainedModel
from tests.audit.test_model_origin import make_run
from tests.support.trained_models import configured, left_by_training

torch.set_num_threads(1)
# As somebody writes it who has the file and its description, and no mpc-fl.
LOAD = """
import sys
sys.path[:] = filter(None, sys.path)
import numpy
path, given, answer = sys.argv[1:]
inputs = numpy.load(given)
if path.endswith(".pt2"):
    import torch
    logits, probabilities = torch.export.load(path).module()(torch.from_numpy(inputs))
else:
    import onnxruntime
    logits, probabilities = onnxruntime.InferenceSession(path).run(["logits", "probabilities"], {"input": inputs})
numpy.save(answer, numpy.stack([logits, probabilities]))
assert "mpc_fl" not in sys.modules
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def asked_elsewhere(path: Path, inputs: np.ndarray, at: Path) -> torch.Tensor:
    """Logits and probabilities, (2, N, classes), of a file in an interpreter that never heard of mpc-fl."""
    np.save(at / "given.npy", inputs.astype(np.float32))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, str(path), str(at / "given.npy"), str(at / "answer.npy")]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(at / "answer.npy"))


def agree(found: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert float(found.std()) > 1e-3  # else anything would agree
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)


both_formats = pytest.mark.parametrize("form", ["torch", "onnx"])


@both_formats
def test_films_of_any_size_are_scaled_classified_and_calibrated(form: export_formats.Format, tmp_path: Path) -> None:
    config = configured("films", calibrated=True)
    model = left_by_training(tmp_path / "run", config)
    done = export(Order(tmp_path / "run", form))
    assert done.file.difference < 1e-4 and done.path.parent == tmp_path / "run"
    for height, width in ((200, 131), (32, 32)):
        values = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "film.png")
        read = read_image(tmp_path / "film.png", ImageForm.of(config.data)).pixels[None]
        found = asked_elsewhere(done.path, values[None, None] / 255, tmp_path)
        agree(found, TrainedModel.read(model, config).answers(read))
    said = json.loads(done.description.read_text())
    assert said["classes"] == list(config.data.classes) and said["input"]["shape"] == ["N", 1, "height", "width"]
    assert said["calibration"] == {"temperature": 1.5, "offsets": [0.0, -1.0, 0.5]}
    assert said["normalisation_of_inputs"] == {"mean": [0.4], "deviation": [0.25]}
    assert said["sha256"] == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert said["model"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert said["model"]["signed_by_all_parties"] is False and said["configuration"] == config.digest()
    assert said["privacy"]["mechanism"] == "none" and said["privacy"]["words"].startswith("No differential privacy")
    for written in (done.path, done.description):  # nothing of this machine
        content = written.read_bytes()
        assert (
            str(tmp_path).encode() not in content and str(Path(exporting.__file__).parents[2]).encode() not in content
        )


@both_formats
def test_rows_of_a_table_are_asked_in_their_own_units(form: export_formats.Format, tmp_path: Path) -> None:
    config = configured("table")
    model = left_by_training(tmp_path / "run", config)
    done = export(Order(tmp_path / "run", form))
    table = tmp_path / "table.csv"
    table.write_text(
        "born,sodium,label,ward,fever,crp\n1950-02-28,136.5,normal,B,yes,12\n1999-12-31,150,viral,,no,<4\n"
        "2019-07-01,141,bacterial,c,1,\n"
    )
    records = torch.from_numpy(read_csv(table, config, None).inputs)
    days = [
        (np.datetime64(day) - np.datetime64("2020-01-01")).astype(int) / 365.25
        for day in ("1950-02-28", "1999-12-31", "2019-07-01")
    ]
    rows = [[136.5, 12, 1, 1, days[0]], [150, 2, np.nan, 0, days[1]], [141, np.nan, 2, 1, days[2]]]
    agree(asked_elsewhere(done.path, np.array(rows), tmp_path), TrainedModel.read(model, config).answers(records))
    refused = asked_elsewhere(done.path, np.array([rows[0], [np.nan, 2, 1, 1, 0], [136, 2, 7, 1, 0]]), tmp_path)
    assert refused.isnan().all(dim=2).tolist() == [[False, True, True]] * 2
    columns = json.loads(done.description.read_text())["input"]["columns"]
    assert [column["name"] for column in columns] == ["sodium", "crp", "ward", "fever", "born"]
    assert columns[0]["unit"] == "mmol/l" and columns[0]["range"] == [135.0, 145.0]
    assert columns[1]["fill"] == "3.5" and columns[2]["categories"] == ["A", "B", "C"]
    assert columns[4]["since"] == "2020-01-01"


@pytest.mark.slow
@both_formats
@pytest.mark.parametrize(("kind", "calibrated"), [("scattering", True), ("lite0", False)])
def test_public_features_are_in_the_file(
    kind: str, calibrated: bool, form: export_formats.Format, tmp_path: Path
) -> None:
    config = configured(kind, calibrated)
    model = left_by_training(tmp_path / "run", config)
    done = export(Order(model, form, tmp_path / "given" / f"ours{export_formats.SUFFIXES[form]}"))
    images = load_hospital(config, 0, "test").inputs[:5]
    agree(asked_elsewhere(done.path, images.numpy(), tmp_path), TrainedModel.read(model, config).answers(images))
    said = json.loads(done.description.read_text())
    assert said["features"]["extractor"] == config.data.features.extractor  # type: ignore[union-attr]
    assert list(said["weights_of_others"]) == ["Features of images"] and "ours" in said["load"]


def signed(directory: Path, config: Config) -> Path:
    """A run whose ledger holds the digest of its model."""
    model = left_by_training(directory / "made", config)
    content = model.read_bytes()
    path = make_run(directory / "run", {"model.safetensors": hashlib.sha256(content).hexdigest()})
    path.write_bytes(content)
    (path.parent / "config.yaml").write_text(config.to_yaml())
    (path.parent / "metrics.jsonl").touch()
    return path


def test_a_signed_private_model_is_said_to_be_so_and_another_one_refused(tmp_path: Path) -> None:
    """Of rows without agreed columns, which are asked in the order of their table; privacy is claimed as in the model card."""
    private = {"mechanism": "local", "epsilon": 6.0, "smallest_hospital": 100}
    config = configured("rows", training={"rounds": 2, "batch_size": 8}, privacy=private)
    model = signed(tmp_path, config)
    done = export(Order(model.parent))
    said = json.loads(done.description.read_text())
    assert said["model"]["signed_by_all_parties"] is True and "all parties" in said["model"]["words"]
    claimed = said["privacy"]
    assert claimed["mechanism"] == "local" and claimed["epsilon_at_most"] == 6.0 and 0 < claimed["epsilon"] <= 6.0
    assert f"| Epsilon of this run alone | {claimed['epsilon']:.3f}" in card_of(model)
    assert "added or removed" in claimed["unit"] and "all others together" in claimed["against"]
    assert "patients" not in claimed

    data, records = load_breast_cancer(), read_breast_cancer(config, "test")
    rows = data.data[[int(patient) for patient in records.patients]]
    expected = TrainedModel.read(model, config).answers(torch.from_numpy(records.inputs))
    agree(asked_elsewhere(done.path, rows, tmp_path), expected)
    assert [column["name"] for column in said["input"]["columns"]] == data.feature_names.tolist()

    before = sorted(model.parent.iterdir())
    model.write_bytes(left_by_training(tmp_path / "other", config.with_values(seed=9)).read_bytes())
    with pytest.raises(ModelError, match="is not the one that all parties signed"):
        export(Order(model.parent, out=model.parent / "again.pt2"))
    assert sorted(model.parent.iterdir()) == before


def test_a_file_that_gives_other_answers_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("rows")
    left_by_training(tmp_path / "run", config)
    before = sorted((tmp_path / "run").iterdir())

    class Other(exporting.WholeNetwork):
        """Its logits are moved by 0.002."""

        def __init__(self, model: TrainedModel) -> None:
            super().__init__(model)
            self.offsets += 0.002

    monkeypatch.setattr(exporting, "WholeNetwork", Other)
    with pytest.raises(ModelError, match="differs from the model by 0.002"):
        export(Order(tmp_path / "run"))
    assert sorted((tmp_path / "run").iterdir()) == before


def test_a_file_that_does_not_load_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_training(tmp_path / "run", configured("rows"))
    before = sorted((tmp_path / "run").iterdir())
    monkeypatch.setattr(exporting, "exported", lambda *_: b"no archive")
    with pytest.raises(ModelError, match="does not load by itself with torch") as caught:
        export(Order(tmp_path / "run"))
    assert str(caught.value).isprintable() and sorted((tmp_path / "run").iterdir()) == before


def test_a_network_that_looks_at_values_is_refused_in_one_line() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x, x) if float(x.sum()) > 0 else (x, -x)

    with pytest.raises(ModelError, match="cannot be exported for torch") as caught:
        export_formats.exported(Branching(), "torch", torch.ones(2, 3), {0: "batch"})
    assert str(caught.value).isprintable()


def test_without_onnxruntime_the_reference_of_onnx_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = export_check.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    left_by_training(tmp_path / "run", configured("table"))
    done = export(Order(tmp_path / "run", "onnx"))
    assert done.file.engine == "onnx.reference" and done.file.difference < 1e-4


def test_questions_are_what_readers_would_give(tmp_path: Path) -> None:
    """Of every form of input; none of it is a patient's."""
    fixed = configured("scattering")
    (question,) = export_check.questions(fixed)
    assert torch.equal(question.records, public_phantoms(4, fixed)) and torch.equal(question.inputs, question.records)
    wide, tall = export_check.questions(configured("films"))
    assert wide.inputs.shape == (4, 1, 32, 49) and tall.inputs.shape == (4, 1, 67, 33)
    assert wide.records.shape == tall.records.shape == (4, 1, 32, 32)
    (rows,) = export_check.questions(configured("table"))
    assert rows.inputs.shape == (4, 5) and rows.records.shape == (4, 8) and bool(rows.inputs.isnan().any())


@pytest.mark.parametrize("name", ["model.safetensors", "."])
def test_places_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    model = left_by_training(tmp_path / "run", configured("rows"))
    content = model.read_bytes()
    order = Order(tmp_path / "run", out=tmp_path / "run" / name, force=True)
    with pytest.raises(ConfigError, match="cannot be the exported file"):
        export(order)
    assert model.read_bytes() == content
    with pytest.raises(ConfigError, match="set `site` alone"):
        export(replace(order, out=tmp_path / "x.pt2", overrides=("data.wrong_size=resize",)))
