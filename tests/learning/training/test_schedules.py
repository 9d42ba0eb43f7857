"""The learning rate over all steps of a run, the same wherever steps are made."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.training import TrainingSection
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.schedules import learning_rate_factor
from mpc_fl.learning.training.server_optimizers import server_optimizer


def factors(**training: object) -> list[float]:
    section = TrainingSection(**training)  # type: ignore[arg-type]
    numbers = range(1, section.rounds + 1)
    return [learning_rate_factor(section, number, step) for number in numbers for step in range(section.local_steps)]


def test_by_default_the_rate_is_constant() -> None:
    assert factors(rounds=3, local_steps=4) == [1.0] * 12


def test_a_cosine_over_all_rounds() -> None:
    found = factors(rounds=5, local_steps=4, schedule="cosine")
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)])


def test_warm_up_rises_evenly_then_the_schedule_begins() -> None:
    assert factors(rounds=2, local_steps=5, warm_up=0.4) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])
    found = factors(rounds=2, local_steps=5, warm_up=0.4, schedule="cosine")
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 0.99), st.sampled_from(["constant", "cosine"]))
def test_every_factor_is_positive_at_most_one_and_falls_after_its_top(
    rounds: int, steps: int, warm_up: float, schedule: str
) -> None:
    found = factors(rounds=rounds, local_steps=steps, warm_up=warm_up, schedule=schedule)
    assert all(0 < factor <= 1 for factor in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)


class Records(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    records_of_patient: list[torch.Tensor]


def test_local_steps_and_the_aggregator_of_fedsgd_go_the_same_way() -> None:
    """Without noise, with everybody in every step, one hospital's local steps are those that the aggregator makes."""
    values = {
        "rounds": 2,
        "local_steps": 3,
        "learning_rate": 0.3,
        "momentum": 0.0,
        "schedule": "cosine",
        "warm_up": 0.2,
    }
    config = Config().with_values(
        model={"architecture": "mlp", "hidden": [5]}, training=values, privacy={"mechanism": "none"}
    )
    model = build_model(config, input_shape=(4,), seed=0)
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    records = Records(inputs, torch.arange(9) % 3, list(torch.arange(9).split(1)))
    update = train_locally(model, records, LocalTraining(config, None, 1.0), 2, Seed(bytes(32))).update

    distributed = config.with_values(privacy={"mechanism": "distributed", "noise_multiplier": 1.0})
    optimizer, flat = server_optimizer(distributed), flatten_parameters(model)
    own = build_model(config, input_shape=(4,), seed=0)
    for step in range(3):
        nn.utils.vector_to_parameters(flat, own.parameters())
        value = nn.functional.cross_entropy(own(inputs), records.labels)
        gradient = torch.autograd.grad(value, list(own.parameters()))
        joined = torch.cat([part.reshape(-1) for part in gradient]).double()
        flat = optimizer.step(flat, joined, learning_rate_factor(distributed.training, 2, step))
    torch.testing.assert_close(update, flat - flatten_parameters(model), rtol=1e-4, atol=1e-6)
