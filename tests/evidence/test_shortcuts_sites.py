"""A probe of sites beside who sees no film: films that say the site, the diagnosis alone, or nothing."""

from __future__ import annotations

import pytest
import torch

from mpc_fl.evidence.shortcuts_sites import site_guesses
from mpc_fl.evidence.shortcuts_tested import Answers


def guessed(decided: torch.Tensor, sites: torch.Tensor) -> Answers:
    logits = torch.nn.functional.one_hot(decided, 3).float()
    return Answers(logits, decided, sites, torch.arange(len(sites)))


def test_a_probe_that_knows_the_site() -> None:
    sites, diagnoses = torch.arange(300) % 3, torch.arange(300) // 3 % 3
    found = site_guesses(guessed(sites, sites), diagnoses, 0)
    assert found.told and found.accuracy.value == found.area.value == 1.0
    assert found.chance == pytest.approx(1 / 3) == found.by_diagnosis and found.gain.value == pytest.approx(2 / 3)


def test_a_probe_that_knows_the_diagnosis_alone_tells_no_site() -> None:
    # Each hospital has mostly one diagnosis, and the probe says whose diagnosis it is.
    sites = torch.arange(300) % 3
    diagnoses = torch.where(torch.arange(300) < 240, sites, (sites + 1) % 3)
    found = site_guesses(guessed(diagnoses, sites), diagnoses, 0)
    assert found.accuracy.value == pytest.approx(0.8) == found.by_diagnosis and found.chance == pytest.approx(1 / 3)
    assert not found.told and found.gain.value == 0.0


def test_a_probe_that_guesses_tells_no_site() -> None:
    sites = torch.arange(300) % 3
    at_random = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0))
    found = site_guesses(guessed(at_random, sites), torch.zeros(300, dtype=torch.int64), 0)
    assert not found.told and found.gain.low < 0 and found.area.low < 0.5 < found.area.high
