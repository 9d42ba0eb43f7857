"""Noised evaluation: one test patient's part is bounded, noise is what is charged, and it is charged before it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.aggregation.rules import Rules
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, HeadroomError, PrivacyBudgetError, ProtocolError
from mpc_fl.federation.aggregator_state import prepare_aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.hospital_state import join
from mpc_fl.federation.noised_evaluation import (
    EvaluationPlan,
    NoisedEvaluation,
    decode_confusion,
    encode_confusion,
    patient_vectors,
    plan_noised_evaluation,
)
from mpc_fl.federation.planning import evaluation_run_name
from mpc_fl.federation.secure_evaluation import aggregator_evaluation, hospital_evaluation
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.evaluation import predict_each
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.distributed_gaussian import add_patients
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")


def configured(mechanism: str = "local", noise: float | None = 4.0, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 120}},
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": 4, "local_steps": 1, "batch_size": 8, "per_sample_gradients": "loop"},
        "privacy": {"mechanism": mechanism, "delta": 1e-3},
        "evaluation": {"noise_multiplier": noise},
        **sections,
    }
    return parse_config(values, "test")


def planned(config: Config) -> EvaluationPlan:
    plan = plan_noised_evaluation(config)
    assert plan is not None
    return plan


def records(labels: list[list[int]]) -> Dataset:
    """Patients with the classes of their records."""
    owners = [patient for patient, own in enumerate(labels) for _ in own]
    flat = [label for own in labels for label in own]
    names = tuple(map(str, range(len(flat))))
    return Dataset(torch.zeros(len(flat), 1, 8, 8), torch.tensor(flat), torch.tensor(owners), names)


def exact(plan: EvaluationPlan, data: Dataset, predicted: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(plan.length, dtype=torch.int64)
    add_patients(plan.mechanism, total, [patient_vectors(plan, data, predicted)])
    return total


@given(st.data(), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=8))
def test_a_patient_moves_the_sum_by_no_more_than_the_sensitivity(data: st.DataObject, labels: list[list[int]]) -> None:
    """However many records it has and whatever the model says of them; and the others' part stays as it is."""
    plan = planned(configured())
    count = sum(map(len, labels))
    predicted = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    first = len(labels[0])
    moved = exact(plan, records(labels), predicted) - exact(plan, records(labels[1:]), predicted[first:])
    assert math.sqrt(sum(value * value for value in moved.tolist())) <= plan.mechanism.sensitivity
    assert torch.equal(moved, exact(plan, records(labels[:1]), predicted[:first]))


def test_what_is_read_from_the_sum_is_the_confusion_matrix_of_patients() -> None:
    plan = planned(configured())
    data, predicted = records([[0], [1, 1], [2], [2]]), torch.tensor([0, 1, 0, 2, 1])
    found = decode_confusion(plan, exact(plan, data, predicted), 3)
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 1]]
    np.testing.assert_allclose(found.counts, expected, atol=2e-3)
    assert found.accuracy == pytest.approx(2.5 / 4, abs=1e-3) and found.patients == pytest.approx(4, abs=1e-2)


@pytest.mark.parametrize(
    ("mechanism", "quorum", "relying"), [("local", 5, 1), ("distributed", 5, 4), ("distributed", 4, 3)]
)
def test_the_noise_that_may_be_relied_on_is_that_of_the_event(mechanism: str, quorum: int, relying: int) -> None:
    """Sums of so many shares have the variance (z B)^2. 60 x 9 draws, chi-square, false-alarm rate 1e-7."""
    from scipy import stats

    plan = planned(configured(mechanism, federation={"hospitals": 5, "quorum": quorum}))
    event = plan.event(3)
    assert (event.noise_multiplier, event.sample_rate, event.steps) == (4.0, 1.0, 3)
    nobody = records([[0]])
    centre = exact(plan, nobody, torch.tensor([0]))
    draws = [
        sum(
            encode_confusion(plan, nobody, torch.tensor([0]), Seed.from_system()).inside_protocol() - centre
            for _ in range(relying)
        )
        for _ in range(60)
    ]
    squares = float(torch.stack(draws).double().square().sum()) / (4.0 * plan.mechanism.sensitivity) ** 2  # type: ignore[arg-type]
    low, high = stats.chi2.ppf([0.5e-7, 1 - 0.5e-7], 60 * 9)
    assert low < squares < high
    of_all = decode_confusion(plan, torch.zeros(9, dtype=torch.int64), 5).deviation
    assert of_all == pytest.approx(4.0 * math.sqrt(5 / relying), rel=0.01)


def test_what_cannot_be_is_refused() -> None:
    plan = planned(configured(aggregation={"count_bound": 3}))
    with pytest.raises(HeadroomError, match="more patients to evaluate on than aggregation.count_bound"):
        encode_confusion(plan, records([[0]] * 4), torch.zeros(4, dtype=torch.int64), Seed.from_system())
    with pytest.raises(ProtocolError, match="another shape"):
        decode_confusion(plan, torch.zeros(8, dtype=torch.int64), 3)
    with pytest.raises(ProtocolError, match="exceeds its bound"):
        decode_confusion(plan, torch.full((9,), plan.mechanism.largest_sum + 1), 3)
    with pytest.raises(ConfigError, match=r"evaluation\.noise_multiplier is charged to a budget"):
        configured("none")
    assert plan_noised_evaluation(configured(noise=None)) is None


def test_scores_say_what_was_counted_and_how_uncertain_it_is() -> None:
    counts = torch.tensor([[80.0, 20.0], [-3.0, 103.0]], dtype=torch.float64)
    noised, sure = NoisedEvaluation(counts, 5.0), NoisedEvaluation(counts, 0.0)
    assert noised.accuracy == pytest.approx(183 / 200)
    low, high = noised.confidence_interval()
    assert low < sure.confidence_interval()[0] and high > sure.confidence_interval()[1]
    scores = typed(Scores, noised.to_json(), "metrics.jsonl")
    assert scores.confusion == [[80, 20], [0, 103]] and scores.noise == 5.0 and scores.scores is None
    nothing = NoisedEvaluation(torch.full((3, 3), -1.0, dtype=torch.float64), 9.0)
    assert 0 <= nothing.accuracy <= 1 and nothing.balanced_accuracy == 0.0 and nothing.patients == 1


def test_evaluation_is_opened_before_the_first_round_and_after_the_last_unless_more_is_asked_for() -> None:
    assert [number for number in range(5) if configured().evaluates(number)] == [0, 4]
    often = configured(evaluation={"every": 3})
    assert [number for number in range(5) if often.evaluates(number)] == [0, 3, 4]


# ---- over links --------------------------------------------------------------------------------------------------------


def run_evaluation(config: Config, number: int, directory: Path) -> dict[str, Any]:
    """At all parties; hospitals are prepared before, since what traces networks cannot run in threads."""
    parties: dict[str, Any] = {"aggregator": prepare_aggregator(config)}
    for rank, name in enumerate(HOSPITALS):
        train, test = load_hospital(config, rank, "train"), load_hospital(config, rank, "test")
        parties[name] = join(config, rank, train, test, PrivacyLedger(directory / f"{name}.json", name))
    names = [*HOSPITALS, "aggregator"]
    signatory = signatories(names, directory / "identities")
    return run_parties_in_memory(evaluation, names, str(directory), number, parties, signatory)


def evaluation(
    links: Any, directory: str, number: int, parties: dict[str, Any], signatory: dict[str, Signatory]
) -> dict[str, Any]:
    """An evaluation at one party: what was opened, what the ledger held when the summand was made, and the result."""
    path = Path(directory) / f"{links.name}.jsonl"
    record = OpeningRecord(path, links.name)
    domain = SecretDomain(links, [*HOSPITALS, "aggregator"], record, signatory=signatory[links.name])
    rules = Rules("aggregator", HOSPITALS, 3, 0, 60.0)
    starts = {name: links.key_fingerprint(name) for name in HOSPITALS}
    plan = RoundPlan(number, 0, HOSPITALS, starts, (), 4, False)
    if links.name == "aggregator":
        _, found = aggregator_evaluation(parties[links.name], domain, rules, HOSPITALS, plan)
        lines = path.read_text().splitlines() if path.exists() else []
        return {"found": found, "lines": lines}
    hospital = parties[links.name]
    own = hospital_evaluation(hospital, domain, rules, HOSPITALS, plan)
    return {"own": own, "charged": hospital.ledger.records()}


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_noised_confusion_matrix_alone_is_opened_and_every_hospital_charges_it(
    mechanism: str, tmp_path: Path
) -> None:
    config = configured(mechanism)
    results = run_evaluation(config, 0, tmp_path)
    found, lines = results["aggregator"]["found"], results["aggregator"]["lines"]
    assert isinstance(found, NoisedEvaluation) and len(lines) == 1
    assert '"shape": [9]' in lines[0] and "noised evaluation" in lines[0]
    for name in HOSPITALS:
        (charge,) = results[name]["charged"]
        assert charge["run"] == evaluation_run_name(config) and charge["noise_multiplier"] == 4.0
        assert (charge["round"], charge["steps"], charge["sample_rate"]) == (0, 1, 1.0)
    # Nine counts with noise: their sum is the number of patients within 3 * 6 standard deviations.
    assert abs(found.patients - 120) < 18 * found.deviation


def test_exact_counts_are_opened_and_nothing_is_charged_without_noise(tmp_path: Path) -> None:
    results = run_evaluation(configured(noise=None), 4, tmp_path)
    found = results["aggregator"]["found"]
    assert found.records == sum(results[name]["own"].records for name in HOSPITALS)
    assert all(results[name]["charged"] == [] for name in HOSPITALS)


def test_no_word_is_said_and_nothing_opened_in_rounds_between(tmp_path: Path) -> None:
    results = run_evaluation(configured(), 2, tmp_path)
    assert results["aggregator"] == {"found": None, "lines": []}
    assert all(results[name]["own"].records > 0 and results[name]["charged"] == [] for name in HOSPITALS)


def test_a_budget_that_is_spent_stops_an_evaluation_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpc_fl.federation import secure_evaluation

    config = configured()
    ledger = PrivacyLedger(tmp_path / "privacy.json", "hospital-0")
    hospital = join(config, 0, load_hospital(config, 0, "train"), load_hospital(config, 0, "test"), ledger)
    ledger.charge(SubsampledGaussian(0.3, 1.0, 10), run="another", round_number=1)
    made: list[Private[torch.Tensor]] = []
    monkeypatch.setattr(secure_evaluation, "encode_confusion", lambda *_: made.append(_[0]))
    plan = RoundPlan(1, 0, HOSPITALS, {}, (), 4, False)
    with pytest.raises(PrivacyBudgetError, match="would raise epsilon"):
        secure_evaluation._noised(
            hospital, planned(config), torch.zeros(len(hospital.test), dtype=torch.int64), plan, "test"
        )
    assert made == [] and len(ledger.records()) == 1


def test_what_is_predicted_of_a_record_does_not_depend_on_who_else_is_there() -> None:
    model = build_model(Config().with_values(data={"image_size": 16}))
    inputs = torch.rand(70, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([predict_each(model, inputs[row : row + 1]) for row in range(len(inputs))])
    for rows in (torch.arange(70), torch.arange(70).flip(0), torch.arange(1, 70, 3)):
        assert torch.equal(predict_each(model, inputs[rows]), alone[rows])
    assert len(predict_each(model, inputs[:0])) == 0
