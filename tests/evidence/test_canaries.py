"""Canaries: each clipped gradient lies along a direction of its own, also when weights have moved as far as they may."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.evidence.canaries import (
    Canaries,
    along_canaries,
    blank_inputs,
    drawn_canaries,
    largest_movement,
    records_of,
)
from mpc_fl.learning.training.per_sample_gradients import clipped_sum, sum_cross_entropy


def canaries(inside: list[bool], norm: float = 1.0, of_each: int = 1) -> Canaries:
    return Canaries(np.array(inside), np.zeros(len(inside), dtype=np.int64), norm, of_each)


@pytest.mark.parametrize("norm", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_a_canary_adds_the_clipping_norm_along_its_own_direction_and_nothing_else(norm: float, moved: float) -> None:
    of = canaries([True, False, True], norm)
    data, network = of.records(0, 6), torch.nn.Linear(of.features, 2, bias=False)
    with torch.no_grad():
        network.weight[:] = 0.0
        step = moved * largest_movement() / norm / np.sqrt(2)  # the gradient is followed downwards
        network.weight[0, :-1], network.weight[1, :-1] = -step, step
    sums = clipped_sum(network, sum_cross_entropy, data.inputs, data.labels, norm)
    assert len(data) == 6 and data.patient_count == 6
    assert along_canaries(sums.gradients[0].reshape(-1)) == pytest.approx([norm, 0.0, norm], rel=1e-4)
    across = sums.gradients[0][:, :-1].sum(dim=0)
    assert float(across.abs().max()) < 1e-5 * norm


def test_patients_have_so_many_records_all_alike_and_nobody_is_like_another() -> None:
    data = canaries([True, True, False, True], of_each=2).records(0, 5)
    assert data.patient_count == 5 and len(data) == 10
    for rows in data.records_of_patient:
        assert len(rows) == 2 and torch.equal(data.inputs[rows[0]], data.inputs[rows[1]])
    assert len(torch.unique(data.inputs, dim=0)) == 5
    assert len(torch.unique(blank_inputs(1000, 3), dim=0)) == 1000
    assert len(records_of(blank_inputs(2, 3), 1)) == 2


def test_half_are_inside_by_the_stream_cipher_and_dealt_out_in_turn() -> None:
    drawn = [drawn_canaries(Seed(bytes([number]) * 32).stream("canaries"), 4000, 2, 1.0, 1) for number in (1, 2)]
    for of in drawn:
        assert abs(of.inside.mean() - 0.5) < 0.05
        assert of.records(0, 0).patient_count + of.records(1, 0).patient_count == of.inside.sum()
    assert (drawn[0].inside != drawn[1].inside).mean() == pytest.approx(0.5, abs=0.05)
