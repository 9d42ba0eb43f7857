"""Checkpoints: what is damaged is not taken for true, and neither is a model that nobody signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.config.config import parse_config
from mpc_fl.errors import ConfigError, MpcFlError
from mpc_fl.federation import checkpoint as checkpoints
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mpc_fl.learning.models.parameters import flatten_parameters, load_flat_parameters

CONFIG = parse_config(
    {
        "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": 3, "local_steps": 2, "batch_size": 16},
        "privacy": {"mechanism": "none"},
    },
    "test",
)


def two_rounds(directory: Path) -> None:
    for number in (1, 2):
        tensors = {"weights": torch.full((3, 5), float(number)), "counts": torch.arange(4) + number}
        save_checkpoint(directory, Checkpoint(number, tensors, {"patients": 60, "spent": [{"round": number}]}), CONFIG)


def path_of(directory: Path, number: int) -> Path:
    return directory / f"checkpoint-{number}.safetensors"


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """A checkpoint changed by somebody who knows its format."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["mpc-fl"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    change(said, tensors)
    path.write_bytes(save(tensors, metadata={"mpc-fl": json.dumps(said)}))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_whatever_bit_is_flipped_the_checkpoint_before_it_is_taken(tmp_path: Path, place: float, bit: int) -> None:
    """The format before this one took nearly every flipped bit of a tensor for true."""
    two_rounds(tmp_path)
    content = bytearray(path_of(tmp_path, 2).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path_of(tmp_path, 2).write_bytes(content)
    try:
        found = load_checkpoint(tmp_path, CONFIG)
    except MpcFlError as error:
        assert "of another version" in str(error) and "\n" not in str(error)  # the bit was in the word "format"
        return
    assert found is not None and torch.equal(found.tensors["weights"], torch.full((3, 5), float(found.round)))
    assert found.round == 1 or found.tensors["counts"].tolist() == [2, 3, 4, 5]


def test_a_run_stops_where_no_checkpoint_is_whole(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    for number in (1, 2):
        content = bytearray(path_of(tmp_path, number).read_bytes())
        content[-3] ^= 4
        path_of(tmp_path, number).write_bytes(content)
    with pytest.raises(MpcFlError, match=r"checkpoint-2.safetensors is damaged: remove the directory"):
        load_checkpoint(tmp_path, CONFIG)
    with pytest.raises(MpcFlError, match=r"checkpoint-1.safetensors is damaged"):
        load_checkpoint(tmp_path, CONFIG, 1)
    assert load_checkpoint(tmp_path / "nowhere", CONFIG) is None


def test_facts_and_names_are_covered_and_so_is_the_round(tmp_path: Path) -> None:
    def renamed(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors["weight"] = tensors.pop("weights")

    changes: list[Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = [
        lambda said, _: said["facts"].update(patients=61),
        lambda said, _: said.pop("sha256"),
        lambda _, tensors: tensors.update(counts=tensors["counts"].reshape(2, 2)),
        renamed,
    ]
    for change in changes:
        two_rounds(tmp_path)
        rewritten(path_of(tmp_path, 2), change)
        found = load_checkpoint(tmp_path, CONFIG)
        assert found is not None and found.round == 1
    two_rounds(tmp_path)
    path_of(tmp_path, 1).rename(path_of(tmp_path, 2))
    with pytest.raises(MpcFlError, match="damaged"):
        load_checkpoint(tmp_path, CONFIG)


def test_another_version_and_another_configuration_are_refused_in_one_line(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    other = CONFIG.with_values(training={"learning_rate": 0.2, "momentum": 0.5})
    with pytest.raises(
        ConfigError, match=r"started with training.learning_rate 0.1, not 0.2; training.momentum 0.9, not 0.5:"
    ):
        load_checkpoint(tmp_path, other)
    rewritten(path_of(tmp_path, 2), lambda said, _: said.update(format="mpc-fl checkpoint 1"))
    with pytest.raises(MpcFlError, match=r"checkpoint-2.safetensors is of another version") as refused:
        load_checkpoint(tmp_path, CONFIG)
    assert "\n" not in str(refused.value)


# ---- the aggregator ----------------------------------------------------------------------------------------------------


def aggregator_after(directory: Path) -> tuple[Aggregator, dict[int, str]]:
    """Checkpoints of rounds 1 and 2, and the digests that all signed."""
    aggregator, signed = prepare_aggregator(CONFIG), {}
    aggregator.patients, aggregator.counted, aggregator.weight_total = 60, CONFIG.federation.hospitals, 64
    for number in (1, 2):
        load_flat_parameters(aggregator.model, flatten_parameters(aggregator.model) + number)
        aggregator.checkpoint(directory, number)
        signed[number] = tensor_digest(aggregator.shared_parameters)
    return aggregator, signed


def sealed_anew(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    facts = {name: value for name, value in said.items() if name != "sha256"}
    said["sha256"] = checkpoints._sha256(facts, tensors)


def test_the_aggregator_goes_on_from_the_model_that_all_signed(tmp_path: Path) -> None:
    before, signed = aggregator_after(tmp_path)
    again = prepare_aggregator(CONFIG)
    assert again.resume(tmp_path, signed.get) and again.round == 2
    assert torch.equal(again.shared_parameters, before.shared_parameters)
    assert (again.patients, again.weight_total) == (60, 64)

    def other_weights(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.startswith("model."))
        tensors[name] = tensors[name] + 1
        sealed_anew(said, tensors)

    def other_total(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        said["facts"]["weight total"] = 65
        sealed_anew(said, tensors)

    def other_network(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.more"] = torch.zeros(3)
        sealed_anew(said, tensors)

    for change in (other_weights, other_total, other_network):
        aggregator_after(tmp_path)
        rewritten(path_of(tmp_path, 2), change)
        again = prepare_aggregator(CONFIG)
        assert again.resume(tmp_path, signed.get) and again.round == 1, change.__name__
        assert tensor_digest(again.shared_parameters) == signed[1]


def test_the_aggregator_stops_where_all_parties_signed_other_models(tmp_path: Path) -> None:
    _, signed = aggregator_after(tmp_path)
    again = prepare_aggregator(CONFIG)
    for of_round in ({}, {1: signed[2], 2: signed[1]}):
        with pytest.raises(MpcFlError, match="holds another global model than all parties signed after round 2"):
            again.resume(tmp_path, of_round.get)
    assert again.round == -1 and not again.resume(tmp_path / "nowhere", signed.get)
