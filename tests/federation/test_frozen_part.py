"""Training runs of last layers, in one process: hospitals pass through the rest once a record, or once for all runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.federation import hospital_state
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.training import frozen_part
from tests.support.training_in_memory import SETTINGS, Training

HOSPITALS, PATIENTS, ROUNDS = ("hospital-0", "hospital-1", "hospital-2"), 30, 3
MODEL = {"architecture": "mlp", "hidden": [6]}
HEAD = {**SETTINGS["training"], "trainable": "head", "rounds": ROUNDS, "batch_size": PATIENTS, "sampling_seed": 1}
PRIVATE = {"delta": 1e-3, "epsilon": 200.0}
KINDS: dict[str, dict[str, Any]] = {
    "no noise": {},
    "local noise": {"privacy": {"mechanism": "local", "noise_multiplier": 2.0, **PRIVATE}},
    "distributed noise": {"privacy": {"mechanism": "distributed", "noise_multiplier": 4.0, **PRIVATE}},
}


def trained(directory: Path, patch: pytest.MonkeyPatch, **changes: Any) -> tuple[torch.nn.Module, Training]:
    """The model of a run."""
    training = Training(directory, patch, **{"model": MODEL, "training": HEAD, "data": SETTINGS["data"], **changes})
    training.run()
    assert set(training.said.values()) == {"finished"}, training.said
    files = [training.party(name) / MODEL_FILE for name in ("aggregator", *HOSPITALS)]
    assert len({path.read_bytes() for path in files}) == 1
    return load_model(files[0], training.config), training


def counting(patch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often which record passes through what is not trained."""
    passed: Counter[bytes] = Counter()
    value = frozen_part._value

    def counted(frozen: torch.nn.Module, record: torch.Tensor) -> torch.Tensor:
        passed[record.numpy().tobytes()] += 1
        return value(frozen, record)

    patch.setattr(frozen_part, "_value", counted)
    return passed


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_passes_once_a_record_through_what_is_not_trained(tmp_path: Path, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        passed = counting(patch)
        model, training = trained(tmp_path, patch, **KINDS[kind])
    first = initial_model(training.config)
    assert torch.equal(model.get_parameter("1.weight"), first.get_parameter("1.weight"))
    assert not torch.equal(model.get_parameter("3.weight"), first.get_parameter("3.weight"))
    trials = [times for times in passed.values() if times > 1]  # of two public records, at each hospital
    assert sorted(trials) == [len(HOSPITALS), 2 * len(HOSPITALS)]
    assert len(passed) - 2 > PATIENTS / 2  # drawn in some round


def test_without_noise_the_model_is_that_of_steps_through_the_whole_network(tmp_path: Path) -> None:
    models = []
    for name in ("head", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "whole":
                patch.setattr(hospital_state, "frozen_outputs_of", lambda *_: None)
            models.append(trained(tmp_path / name, patch)[0])
    alone, whole = (model.get_parameter("3.weight").detach() for model in models)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


DEEP = {"architecture": "mlp", "hidden": [6, 5]}


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_last_layers_too_and_a_second_run_reads_what_the_first_kept(tmp_path: Path, kind: str) -> None:
    site, files = {"feature_cache": str(tmp_path / "cache")}, []
    last = {**HEAD, "trainable": "last:2"}
    for run in ("first", "second"):
        with pytest.MonkeyPatch.context() as patch:
            passed = counting(patch)
            model, training = trained(tmp_path / run, patch, model=DEEP, training=last, site=site, **KINDS[kind])
        first = initial_model(training.config)
        assert torch.equal(model.get_parameter("1.weight"), first.get_parameter("1.weight"))
        assert not torch.equal(model.get_parameter("3.weight"), first.get_parameter("3.weight"))
        trials = [times for times in passed.values() if times > 1]
        assert sorted(trials) == [len(HOSPITALS), 2 * len(HOSPITALS)]
        records = len(passed) - len(trials)
        assert records > PATIENTS / 2 if run == "first" else records == 0, records
        files.append((training.party("hospital-0") / MODEL_FILE).read_bytes())
    assert files[0] == files[1] if kind == "no noise" else files[0] != files[1]
