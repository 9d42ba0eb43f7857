"""`inference.engine`: one interface, two engines, between real processes; what is special to `fast` also in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl import roles
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, UnsupportedLayerError
from mpc_fl.inference import diagnosis, results
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.links.links import Links
from mpc_fl.roles import DEALER
from tests.support.harness import run_parties

NAMES = [roles.HOSPITAL, roles.MODEL_OWNER, DEALER]


def configuration(**inference: Any) -> Config:
    data = {"image_size": 16, "channels": 1}
    return Config().with_values(
        task="infer", data=data, model={"architecture": "small_cnn"}, inference={"batch_size": 2, **inference}
    )


def model_of(config: Config) -> torch.nn.Module:
    model = build_model(config)
    calibrate_batchnorm(model, public_phantoms(32, config))
    return model.eval()


def records() -> Dataset:
    images = public_phantoms(40, configuration())[35:]
    return Dataset(images, torch.zeros(5, dtype=torch.int64), torch.arange(5), tuple("abcde"))


def one_party(links: Links, inference: dict[str, Any], directory: str) -> Any:
    config = configuration(**inference)
    diagnosis.require_supported(config)
    if links.name == DEALER:
        return diagnosis.dealing_of(config)(links)
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    if links.name == roles.MODEL_OWNER:
        return diagnosis.answer_requests(config, model_of(config), links, record)
    progress: list[tuple[int, int]] = []
    found = diagnosis.request_diagnoses(
        config, records(), links, record, lambda _phase, done, total: progress.append((done, total))
    )
    results.write_results(config, records(), found, Path(directory))
    return progress[-1]


def run(directory: Path, **inference: Any) -> list[dict[str, Any]]:
    got = run_parties(one_party, NAMES, directory, inference, str(directory))
    assert got[roles.MODEL_OWNER] == 3  # batches
    assert got[roles.HOSPITAL][0] == got[roles.HOSPITAL][1]
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


@pytest.mark.processes
@pytest.mark.parametrize(
    "inference",
    [{"engine": "fast"}, {"engine": "fast", "at_once": 2, "limit": 5}, {"engine": "reference", "limit": 5}],
)
def test_both_engines_give_the_plaintext_logits(inference: dict[str, Any], tmp_path: Path) -> None:
    lines = run(tmp_path, **inference)
    with torch.no_grad():
        plain = model_of(configuration())(records().inputs)
    assert float((torch.tensor([line["logits"] for line in lines]) - plain).abs().max()) < 0.02
    assert [line["predicted"] for line in lines] == plain.argmax(1).tolist()
    assert all(abs(sum(line["probabilities"]) - 1) < 1e-5 for line in lines)


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_the_model_owner_of_one_diagnosis_answers_no_more_than_its_limit(engine: str, tmp_path: Path) -> None:
    """The hospital here asks about five images, whatever was agreed."""
    with pytest.raises(AssertionError, match="ProtocolError: the hospital asked about more than 3 images"):
        run(tmp_path, engine=engine, limit=3)
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.processes
def test_the_hospital_can_learn_the_label_alone(tmp_path: Path) -> None:
    lines = run(tmp_path, engine="fast", reveal="label")
    with torch.no_grad():
        plain = model_of(configuration())(records().inputs)
    assert [line["predicted"] for line in lines] == plain.argmax(1).tolist()
    assert all(line["logits"] is None and line["probabilities"] is None for line in lines)
    openings = [json.loads(line) for line in (tmp_path / f"{roles.HOSPITAL}.jsonl").read_text().splitlines()]
    assert {opening["what"] for opening in openings} == {"label"}


def test_what_an_engine_cannot_do_is_said_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="needs inference.engine=fast"):
        diagnosis.require_supported(configuration(engine="reference", reveal="label"))
    group_norm = configuration(engine="fast").with_values(model={"normalisation": "group"})
    with pytest.raises(UnsupportedLayerError, match="no counterpart in the engine fast"):
        diagnosis.require_supported(group_norm)
    diagnosis.require_supported(configuration(engine="fast"))
