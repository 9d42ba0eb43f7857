"""With a privacy mechanism nothing that is released is shaped by how many patients a hospital has.

Neighbouring data sets differ in one patient; so sampling rate, noise multiplier, divisor, weights and what is charged must
be the same with one patient less, and only noised sums may show the difference.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.aggregation.rules import Rules
from mpc_fl.audit.opening_record import Opening, OpeningRecord
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, PrivacyBudgetError
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.hospital_round import charge_round
from mpc_fl.federation.hospital_state import Hospital, join
from mpc_fl.federation.planning import (
    Done,
    budget_of,
    mechanism_of,
    plan_release,
    releases_beside_steps,
    require_public_values,
    rounds_to_come,
    sample_rate_of,
)
from mpc_fl.federation.preparation import aggregator_preparation, heaviest_weight, hospital_preparation
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import PublicSizes, load_hospital, public_sizes
from mpc_fl.learning.data.partition import partition_equal
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of
from mpc_fl.learning.privacy.distributed_gaussian import mean_gradient
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.learning.training import dp_sgd
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")
MECHANISMS = ("local", "distributed")


def configured(mechanism: str = "local", **sections: Any) -> Config:
    """Tables of four features, as no phantoms are: public figures must be configured."""
    values: dict[str, Any] = {
        "data": {"source": "csv", "classes": ["ill", "well"], "table": {"features": 4}},
        "model": {"architecture": "mlp", "hidden": [3]},
        "training": {"rounds": 3, "local_steps": 2, "batch_size": 8, "per_sample_gradients": "hooks"},
        "privacy": {"mechanism": mechanism, "delta": 1e-3, "smallest_hospital": 20, "largest_hospital": 60},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values, "test")


def records(patients: int, seed: int = 0) -> Dataset:
    """So many patients with one or two records; with one less, the others are the same."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.tensor([patient for patient in range(patients) for _ in range(1 + patient % 2)])
    inputs = torch.randn(2 * patients, 4, generator=generator)[: len(owners)]
    labels = torch.tensor([patient % 2 for patient in owners.tolist()])
    return Dataset(inputs, labels, owners, tuple(map(str, range(len(owners)))))


def hospital_of(config: Config, patients: int, directory: Path, rank: int = 0) -> Hospital:
    directory.mkdir(parents=True, exist_ok=True)
    ledger = PrivacyLedger(directory / "privacy.json", f"hospital-{rank}")
    return join(config, rank, records(patients), records(6, 1), ledger)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@settings(max_examples=15, deadline=None)
@given(patients=st.integers(21, 60), batch=st.integers(1, 40), noise=st.sampled_from([None, 4.0]))
def test_one_patient_less_changes_no_rate_no_noise_and_no_charge(
    mechanism: str, patients: int, batch: int, noise: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    privacy = {"noise_multiplier": noise, "epsilon": 1e3 if noise else 8.0}
    config = configured(mechanism, privacy=privacy, training={"batch_size": batch})
    found = []
    for count in (patients, patients - 1):
        hospital = hospital_of(config, count, tmp_path_factory.mktemp("hospital"))
        charge_round(hospital, 1)
        charged = [
            {key: value for key, value in one.items() if key not in ("time", "number")}
            for one in hospital.ledger.records()
        ]
        found.append((hospital.sample_rate, hospital.noise_multiplier, hospital.mechanism, charged, hospital.epsilon()))
    assert found[0] == found[1]
    assert found[0][0] == min(1.0, batch / 20)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_noise_multiplier_is_calibrated_for_all_hospitals_alike(mechanism: str) -> None:
    config = configured(mechanism)
    plans = [plan_release(config, patients, [], "hospital") for patients in (20, 21, 59, 60)]
    assert plans[0] is not None and all(plan == plans[0] for plan in plans)


def test_a_step_with_the_same_patients_drawn_is_the_same_whoever_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The divisor is the configured batch size: with the number of patients in it, the update would scale with them."""
    # More than there are patients: the old divisor was then their number, also where all are drawn at the public rate 1.
    config = configured(training={"rounds": 1, "local_steps": 3, "batch_size": 64})
    monkeypatch.setattr(dp_sgd, "sample_patients", lambda *_: torch.tensor([0, 1, 3, 4]))
    model = prepare_aggregator(config).model
    updates = []
    for patients in (40, 39, 21):
        training = LocalTraining(config, 1.0, sample_rate_of(config, patients), Seed(b"s" * 32), "hooks")
        updates.append(train_locally(model, records(patients), training, 1, Seed(b"n" * 32)).update)
    assert all(torch.equal(update, updates[0]) for update in updates)
    assert bool(updates[0].any())


def test_a_mean_gradient_is_divided_by_the_public_batch_size() -> None:
    mechanism = mechanism_of(configured("distributed"), 10)
    assert mechanism.divisor == 8 and mechanism.expected_patients == 24  # 8 / 20 of at most 60 patients
    opened = torch.full((10,), 1000)
    expected = 1000 / (mechanism.scale * 3 * 8)
    assert mean_gradient(mechanism, opened) == pytest.approx([expected] * 10)


def preparation(
    links: Any,
    directory: str,
    config: Config,
    hospitals: dict[str, Hospital],
    aggregator: Aggregator,
    signatory: dict[str, Signatory],
) -> tuple[list[str], Any]:
    """The sums before the first round at one party: what was opened, and what the aggregator takes weights from."""
    path = Path(directory) / f"{links.name}.jsonl"
    record = OpeningRecord(path, links.name)
    domain = SecretDomain(links, [*HOSPITALS, "aggregator"], record, signatory=signatory[links.name])
    rules = Rules("aggregator", tuple(HOSPITALS), 3, 0, 60.0)
    starts = {name: links.key_fingerprint(name) for name in HOSPITALS}
    plan = RoundPlan(0, 0, tuple(HOSPITALS), starts, tuple(HOSPITALS), 1, False)
    if links.name == "aggregator":
        aggregator_preparation(aggregator, domain, record, rules, plan)
        return _opened(path), (aggregator.patients, aggregator.weight_total, aggregator.mean_factor(2))
    hospital_preparation(hospitals[links.name], domain, record, rules, plan)
    return _opened(path), None


def _opened(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "number of patients" in line] if path.exists() else []


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "none"])
def test_no_number_of_patients_is_opened_with_a_mechanism(mechanism: str, tmp_path: Path) -> None:
    config = configured(mechanism)
    hospitals = {name: hospital_of(config, 20 + 7 * rank, tmp_path / name, rank) for rank, name in enumerate(HOSPITALS)}
    names, aggregator = [*HOSPITALS, "aggregator"], prepare_aggregator(config)
    signatory = signatories(names, tmp_path / "identities")
    results = run_parties_in_memory(preparation, names, str(tmp_path), config, hospitals, aggregator, signatory)
    counted = {len(opened) for opened, _ in results.values()}
    patients, weight_total, factor = results["aggregator"][1]
    if mechanism == "none":
        assert counted == {1} and patients == 20 + 27 + 34 and weight_total == 128
    else:
        assert counted == {0} and patients == 3 and weight_total == 4 and factor == 4 / 2
    # An exact number of patients is a release without noise, and enters every ledger as that.
    spent = {hospital.ledger.epsilon(1e-3) for hospital in hospitals.values()}
    assert spent == {math.inf if mechanism == "none" else 0.0}


def test_exact_weights_with_a_mechanism_are_refused() -> None:
    for mechanism in MECHANISMS:
        with pytest.raises(ConfigError, match=r"aggregation\.weighted would open the exact number of patients"):
            plan_release(configured(mechanism, aggregation={"weighted": True}), 30, [], "hospital-0")
        with pytest.raises(ConfigError, match=r"aggregation\.weighted"):
            prepare_aggregator(configured(mechanism, aggregation={"weighted": True}))
    assert configured("none").counts_patients and configured("none", aggregation={"weighted": True}).counts_patients
    assert not configured("none", aggregation={"weighted": False}).counts_patients
    assert not configured("local").counts_patients


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_public_figure_must_be_there_and_hold(mechanism: str) -> None:
    nothing = configured(mechanism, privacy={"smallest_hospital": None, "largest_hospital": None})
    with pytest.raises(ConfigError, match=r"privacy\.smallest_hospital is not set.*never from the number"):
        plan_release(nothing, 30, [], "hospital-0")
    with pytest.raises(ConfigError, match=r"privacy\.smallest_hospital is not set"):
        prepare_aggregator(nothing)
    with pytest.raises(PrivacyBudgetError, match="fewer patients than privacy.smallest_hospital"):
        plan_release(configured(mechanism), 19, [], "hospital-0")
    with pytest.raises(PrivacyBudgetError, match="more patients than privacy.largest_hospital, 60"):
        plan_release(configured(mechanism), 61, [], "hospital-0")
    with pytest.raises(ConfigError, match="largest_hospital needs a smallest_hospital"):
        configured(mechanism, privacy={"largest_hospital": 19})


@pytest.mark.parametrize(
    "data",
    [
        {"phantoms": {"train_patients": 91}},
        {"phantoms": {"train_patients": 91}, "subset": {"train_patients": 17}},
        {"phantoms": {"train_patients": 300}, "partition": {"method": "dirichlet", "alpha": 1.0}},
        {"phantoms": {"train_patients": 40}, "partition": {"method": "none"}},
    ],
    ids=["equal", "subset", "dirichlet", "all of them"],
)
def test_sizes_of_phantoms_follow_from_the_configuration(data: dict[str, Any]) -> None:
    config = parse_config({"data": {"image_size": 8, **data}}, "test")
    sizes = [load_hospital(config, rank, "train").patient_count for rank in range(3)]
    assert public_sizes(config) == PublicSizes(min(sizes), max(sizes))
    stated = config.with_values(privacy={"smallest_hospital": 10})
    assert public_sizes(stated) == PublicSizes(10, 40)  # four times as many, unless more is said


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_set_of_fixed_size_is_refused_where_privacy_is_promised(mechanism: str) -> None:
    """With one patient less another one trains: two have changed, and epsilon is for one."""
    before, after = (
        {f"person{number}" for number in partition_equal([f"person{n}" for n in range(count)], np.zeros(count), 1, 0)[0][:20]}
        for count in (60, 59)
    )  # fmt: skip
    assert before == after or len(before ^ after) == 2
    images = {"data": {"source": "images", "subset": {"train_patients": 20}}, "privacy": {"smallest_hospital": 20}}
    for tests_only in (False, True):
        config = configured(mechanism, **images)
        if tests_only:
            noised = {"noise_multiplier": 3.0}
            config = config.with_values(data={"subset": {"test_patients": 9}}, evaluation=noised)
        with pytest.raises(ConfigError, match="two who change, and epsilon is for one: leave data.subset null"):
            plan_release(config, 20, [], "hospital-0")
    exact = configured(mechanism, data={"source": "images", "subset": {"test_patients": 9}}, privacy=images["privacy"])
    require_public_values(exact)
    require_public_values(configured("none", **images))


# ---- rounds that are lost ----------------------------------------------------------------------------------------------


def charge_rounds(config: Config, mechanism: str, ledger: PrivacyLedger, times: int, start: int = 0) -> None:
    planned = plan_release(config, 30, [], "hospital-0")
    assert planned is not None
    event = replace(planned, steps=config.training.local_steps)
    for number in range(start, start + times):
        ledger.charge(event, run="phantoms", round_number=number, budget=budget_of(config))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_spare_rounds_may_be_lost_and_stay_charged(mechanism: str, spare: int, tmp_path: Path) -> None:
    config = configured(mechanism, privacy={"spare_rounds": spare})
    ledger = PrivacyLedger(tmp_path / "privacy.json", "hospital-0")
    charge_rounds(config, mechanism, ledger, 3 + spare)
    assert 7.9 < epsilon_of(ledger.spent(), 1e-3) <= 8.0
    with pytest.raises(PrivacyBudgetError, match="would raise epsilon"):
        charge_rounds(config, mechanism, ledger, 1, 9)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_run_that_goes_on_after_losses_still_fits(mechanism: str, tmp_path: Path) -> None:
    """One round is complete and one was lost: two are left, one of two spare ones. A third loss ends it before anything."""
    config = configured(mechanism, privacy={"spare_rounds": 2})
    ledger = PrivacyLedger(tmp_path / "privacy.json", "hospital-0")
    charge_rounds(config, mechanism, ledger, 2)
    done = Done(rounds=1, charged=2)
    assert rounds_to_come(config, done) == 3
    assert plan_release(config, 30, ledger.spent(), "hospital-0", done) is not None
    charge_rounds(config, mechanism, ledger, 2, 2)
    done = Done(rounds=1, charged=4)
    assert rounds_to_come(config, done) == 2
    if (
        mechanism == "distributed"
    ):  # its noise is fixed for the run; local noise would be calibrated anew, and be larger
        with pytest.raises(PrivacyBudgetError, match="would bring epsilon to"):
            plan_release(config, 30, ledger.spent(), "hospital-0", done)


def test_all_that_is_opened_besides_rounds_is_planned_for() -> None:
    table = {"reference_ranges": [[0.0, 1.0]] * 4, "features": 4}
    config = configured(data={"normalise": "secure", "table": table}, evaluation={"noise_multiplier": 5.0, "every": 2})
    beside = releases_beside_steps(config)
    assert [event.noise_multiplier for event in beside] == [8.0, 8.0, 5.0]
    assert beside[-1].steps == 3 + 1  # before the first round, after rounds 2 and 3, and a spare one
    assert [event.steps for event in releases_beside_steps(config, Done(2, 2, 1, 2))] == [2]
    planned = plan_release(config, 30, [], "hospital-0")
    assert planned is not None
    assert 7.9 < epsilon_of([*beside, planned], 1e-3) <= 8.0
    alone = plan_release(configured(), 30, [], "hospital-0")
    assert alone is not None and planned.noise_multiplier > alone.noise_multiplier


def test_a_lost_sum_of_features_and_evaluation_stay_within_the_plan() -> None:
    """Whatever is lost, up to one spare of each kind, what is spent and still to come never exceeds the plan."""
    table = {"reference_ranges": [[0.0, 1.0]] * 4, "features": 4}
    config = configured(data={"normalise": "secure", "table": table}, evaluation={"noise_multiplier": 5.0, "every": 1})
    whole: dict[float, int] = {}
    for event in releases_beside_steps(config):
        whole[event.noise_multiplier] = whole.get(event.noise_multiplier, 0) + event.steps
    for rounds in (None, 0, 1, 2, 3):
        for features in (0, 1, 2):
            for evaluations in range(6):
                came = 0 if rounds is None else rounds + 1
                if evaluations not in (came, came + 1) or (rounds is not None and features == 0):
                    continue
                total = {8.0: features, 5.0: evaluations}
                for event in releases_beside_steps(config, Done(rounds, 0, features, evaluations)):
                    total[event.noise_multiplier] += event.steps
                assert total[5.0] <= whole[5.0] and total[8.0] <= max(whole[8.0], features + (rounds is None))
    assert isinstance(releases_beside_steps(config)[0], SubsampledGaussian)


def test_a_hospital_that_was_not_counted_weighs_what_is_left_beside_those_that_were(tmp_path: Path) -> None:
    """The sum of weights stays at most 1, whatever it has."""
    config, record = configured("none"), OpeningRecord(tmp_path / "record.jsonl", "hospital-2")
    counted = ("hospital-0", "hospital-1")
    record.append(
        Opening("number of patients", "total weight of the mean", (1,), ("aggregator",), (*counted, "aggregator"))
    )
    assert heaviest_weight(config, record, "hospital-0", 128) is None
    assert heaviest_weight(config, record, "hospital-2", 128) == 64
    assert heaviest_weight(configured("local"), record, "hospital-2", 4) is None
    hospital = hospital_of(config, 100, tmp_path / "large", 2)
    hospital.heaviest = 64
    assert hospital.weight == 64
