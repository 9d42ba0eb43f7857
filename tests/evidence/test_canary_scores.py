"""Scores: what a step adds to a release against SGD itself, and that they undo it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpc_fl.evidence.canary_scores import Claim, Steps, scores_of, step_responses


@pytest.mark.parametrize("lasts", [False, True])
def test_what_a_step_adds_is_what_sgd_makes_of_it(lasts: bool) -> None:
    rates, gradients = [0.5, 0.25, 0.2, 0.1, 0.3, 0.05], torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])
    weight, released = torch.nn.Parameter(torch.zeros(1)), []
    sgd = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    for release in range(3):
        if not lasts:
            sgd = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        before = float(weight.detach())
        for step in (2 * release, 2 * release + 1):
            sgd.param_groups[0]["lr"] = rates[step]
            weight.grad = gradients[step].reshape(1)
            sgd.step()
        released.append(before - float(weight.detach()))
    responses = step_responses(Steps(2, rates, 0.9, lasts))
    assert responses @ gradients.double().numpy() == pytest.approx(released, rel=1e-5)


def test_where_each_release_has_one_step_the_score_is_that_of_the_steps_themselves() -> None:
    generator = np.random.Generator(np.random.Philox(2))
    gradients, claim = generator.normal(size=(4, 7)), Claim(1.5, 0.3)
    responses = step_responses(Steps(1, [0.1, 0.2, 0.1, 0.05], 0.9, True))
    mixed = scores_of(responses @ gradients, responses, claim)
    assert mixed == pytest.approx(scores_of(gradients, np.eye(4), claim))
    density = np.log(0.7 + 0.3 * np.exp((gradients - 0.5) / 1.5**2)).sum(axis=0)
    assert mixed == pytest.approx(density)


def test_of_mixed_steps_the_estimate_has_the_weights_of_the_best_linear_one() -> None:
    """It tells two hypotheses apart at least as well as the plain sum of releases."""
    responses = step_responses(Steps(3, [0.1] * 9, 0.9, True))
    weights = scores_of(np.eye(3), responses, Claim(1.0, 1.0))

    def signal_to_noise(of: np.ndarray) -> float:
        return float(of @ responses.sum(axis=1) / np.sqrt(of @ responses @ responses.T @ of))

    assert signal_to_noise(weights) > 1.05 * signal_to_noise(np.ones(3))


def test_without_noise_releases_add_up() -> None:
    assert scores_of(np.array([[1.0, 0.0], [2.0, 0.0]]), np.eye(2), Claim(None, 0.1)).tolist() == [3.0, 0.0]
