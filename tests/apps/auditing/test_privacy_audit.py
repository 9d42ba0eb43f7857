"""The audit of privacy finds no fault in what is right, and finds the faults that are put in: each within the code that trains."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.federation import federated_sgd
from mpc_fl.learning.privacy.discrete_gaussian import DiscreteGaussian
from mpc_fl.learning.privacy.distributed_gaussian import DistributedGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training import dp_sgd, noised_optimizer
from tests.support.auditing import audit, audited, contradictions, same_seeds

MANY = 4000  # canaries in a repetition; four of them show a fault with a probability of 0.98


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    torch.set_num_threads(1)


@pytest.mark.parametrize("of_patients", [True, False], ids=["patients", "records"])
@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_an_honest_run_loses_less_than_the_accountant_says_and_more_than_nothing(
    mechanism: str, of_patients: bool
) -> None:
    found = audit(audited(mechanism), 2000, 1, of_patients)
    assert found.upper == [pytest.approx(1.448, abs=0.01)]
    assert len(found.bounds) == 2 and not contradictions(found)
    assert 0.1 < found.bounds[0].lower < found.upper[0]


def test_sampled_steps_with_momentum_over_rounds_are_audited_too() -> None:
    found = audit(audited("local", rounds=3, local_steps=2, batch_size=50, momentum=0.9), 600, 1)
    assert found.upper == sorted(found.upper) and len(found.upper) == 3
    assert [bound.round for bound in found.bounds] == [2, 3, 3] and not contradictions(found)


def test_without_noise_canaries_are_known() -> None:
    found = audit(audited("none", rounds=5, batch_size=400), 400, 1)
    assert found.upper == []
    for bound in found.bounds:
        assert bound.upper is None and bound.right == bound.guesses > 300
        assert bound.lower > 4


def half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noised_optimizer.gaussian_noise
    monkeypatch.setattr(noised_optimizer, "gaussian_noise", lambda stream, shape: drawn(stream, shape) / 2)
    share = DistributedGaussian.noise_share.fget
    assert share is not None

    def halved(mechanism: DistributedGaussian) -> DiscreteGaussian:
        return DiscreteGaussian(Fraction(share(mechanism).variance) / 4)

    monkeypatch.setattr(DistributedGaussian, "noise_share", property(halved))


def every_record_for_a_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = dp_sgd.sample_patients

    def each(records: Sequence[torch.Tensor], rate: float, stream: Stream) -> torch.Tensor:
        return sample([row.reshape(1) for rows in records for row in rows], rate, stream)

    monkeypatch.setattr(dp_sgd, "sample_patients", each)
    monkeypatch.setattr(federated_sgd, "sample_patients", each)


def half_the_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    epsilon = PrivacyLedger.epsilon

    def halved(ledger: PrivacyLedger, *given: Any) -> float:
        return epsilon(ledger, *given) / 2.5

    monkeypatch.setattr(PrivacyLedger, "epsilon", halved)


def is_caught(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """By an audit, or by another one: each misses a fault once in fifty, and which draws it makes depends on all that the process
    has drawn before."""
    first = contradictions(audit(audited(mechanism), MANY, 4))
    same_seeds(monkeypatch, 1)
    return bool(first or contradictions(audit(audited(mechanism), MANY, 4)))


@pytest.mark.parametrize("fault", [half_the_noise, every_record_for_a_patient])
@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_faults_that_double_what_a_patient_shows_are_caught(
    fault: Any, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert is_caught(mechanism, monkeypatch)


def test_records_cannot_be_counted_twice_where_each_patient_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    every_record_for_a_patient(monkeypatch)
    assert not contradictions(audit(audited("local"), 2000, 1, of_patients=False))


def test_an_accountant_that_says_less_than_is_spent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    half_the_epsilon(monkeypatch)
    assert is_caught("local", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("fault", [half_the_noise, every_record_for_a_patient])
@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_fault_is_caught_with_a_probability_over_95_percent(
    fault: Any, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 16,000 canaries, as by default, and seeds of the system: of 20 audits 18 at least, which chance falls below once in 140
    where the probability is 0.98."""
    monkeypatch.undo()
    fault(monkeypatch)
    assert sum(bool(contradictions(audit(audited(mechanism), MANY, 4))) for _ in range(20)) >= 18
