"""Groups of test patients: what is opened is what was counted in the clear, of groups that are large enough alone, and charged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.aggregation.rules import Rules
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import HeadroomError, MpcFlError, PrivacyBudgetError, ProtocolError
from mpc_fl.federation import group_evaluation, group_sums
from mpc_fl.federation.aggregator_state import prepare_aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.group_evaluation import (
    Cell,
    GroupPlan,
    GroupSizes,
    OwnDecisions,
    decode_groups,
    decode_sizes,
    encode_exact,
    encode_noised,
    encode_sizes,
    plan_groups,
    shown_cells,
)
from mpc_fl.federation.hospital_state import Hospital, join
from mpc_fl.federation.planning import Done, groups_run_name, plan_release, releases_beside_steps
from mpc_fl.federation.secure_evaluation import aggregator_evaluation, evaluated_groups, hospital_evaluation
from mpc_fl.files import read_json_lines
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.evaluation import Evaluation, evaluate_locally, predict
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, epsilon_of
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import AGGREGATOR
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories
from tests.support.training_in_memory import KILLED, SETTINGS, Sleeper, Training

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")
GROUPS = {"sex": ["female", "male"], "age_bands": [30, 60]}
PRIVACY = {"mechanism": "local", "delta": 1e-3, "epsilon": 60.0}


def configured(noise: float | None = None, fewest: int = 20, **sections: Any) -> Config:
    groups = sections.pop("groups", GROUPS if noise is None else {**GROUPS, "site": True})
    evaluation = {"groups": groups, "fewest_in_group": fewest, "group_size_noise": 1.0, "noise_multiplier": noise}
    values: dict[str, Any] = {
        "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 240}},
        "model": {"architecture": "mlp", "hidden": [4]},
        "training": {"rounds": 2, "local_steps": 1, "batch_size": 8, "per_sample_gradients": "loop"},
        "privacy": {"mechanism": "none"} if noise is None else PRIVACY,
        "evaluation": evaluation,
        **sections,
    }
    return parse_config(values, "test")


def planned(config: Config) -> GroupPlan:
    plan = plan_groups(config)
    assert plan is not None
    return plan


def patients(labels: list[list[int]], sexes: list[list[int]]) -> Dataset:
    """Patients with the classes and groups of their records; of no known age."""
    owners = [patient for patient, own in enumerate(labels) for _ in own]
    flat, groups = ([value for own in of for value in own] for of in (labels, sexes))
    known = {"sex": torch.tensor(groups), "age": torch.full((len(flat),), 3)}
    names = tuple(map(str, range(len(flat))))
    return Dataset(torch.zeros(len(flat), 1, 8, 8), torch.tensor(flat), torch.tensor(owners), names, groups=known)


def decisions(tests: Dataset, decided: list[int]) -> OwnDecisions:
    chances = torch.nn.functional.one_hot(torch.tensor(decided), 3).double() * 0.7 + 0.1
    return OwnDecisions(evaluate_locally(chances, tests.labels), chances, torch.tensor(decided))


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Summands as they are before noise is added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_evaluation, "noised_share", lambda _mechanism, total, _seed, _threads: total)
        yield


# ---- which groups are shown --------------------------------------------------------------------------------------------


def cells_of(
    sizes: list[float], noise: float | None = None, deviation: float = 2.0, fewest: int = 20
) -> list[tuple[int, ...]]:
    plan = planned(configured(noise, fewest, groups={"sex": ["a", "b", "c"]}))
    assert plan.length == len(sizes) == 4
    return [cell.members for cell in shown_cells(plan, GroupSizes(torch.tensor(sizes, dtype=torch.float64), deviation))]


def test_a_group_is_shown_when_its_noise_leaves_no_doubt_that_it_is_large_enough() -> None:
    assert cells_of([24.0, 23.9, 100.0, 3.0], noise=2.0) == [(0,), (2,)]
    assert cells_of([24.0, 24.0, 24.0, 24.0]) == [(0,), (1,), (2,), (3,)]
    assert cells_of([10.0, 3.0, -2.0, 0.0], noise=2.0) == []


def test_what_a_difference_of_exact_counts_would_show_is_joined_with_the_smallest_group() -> None:
    """All less the shown ones are the withheld ones."""
    assert cells_of([60.0, 80.0, 90.0, 1.5]) == [(0, 3), (1,), (2,)]
    assert cells_of([60.0, 80.0, 4.0, 1.5]) == [(0, 2, 3), (1,)]
    assert cells_of([60.0, 80.0, 20.0, 19.0]) == [(0,), (1,)]  # together they are enough
    assert cells_of([60.0, 3.0, 4.0, 1.5]) == []  # the rest would be all patients
    assert cells_of([60.0, 80.0, 90.0, 1.5], noise=2.0) == [(0,), (1,), (2,)]  # noise protects a difference


@given(st.lists(st.floats(-20, 300), min_size=4, max_size=4), st.floats(0.5, 10))
def test_whatever_the_sizes_no_difference_shows_few_patients(sizes: list[float], deviation: float) -> None:
    shown = cells_of(sizes, deviation=deviation)
    members = [member for cell in shown for member in cell]
    assert len(set(members)) == len(members)
    for cell in shown:
        assert sum(sizes[member] - 2 * deviation for member in cell[:1]) >= 20
    left = [number for number in range(4) if number not in members]
    if shown and left:
        assert sum(sizes[number] for number in left) - 2 * deviation * math.sqrt(len(left)) >= 20


# ---- what enters sums --------------------------------------------------------------------------------------------------


@given(st.data(), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=2, max_size=6))
def test_a_patient_moves_no_sum_by_more_than_its_sensitivity(data: st.DataObject, labels: list[list[int]]) -> None:
    plan = planned(configured(2.0, groups=GROUPS))
    sexes = [data.draw(st.lists(st.integers(0, 2), min_size=len(own), max_size=len(own))) for own in labels]
    decided = [data.draw(st.integers(0, 2)) for own in labels for _ in own]
    cells, seed = plan.cells, Seed.from_system()
    mechanism = plan.counts(cells)
    assert mechanism is not None

    def summands(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        tests = patients(labels[first:], sexes[first:])
        found = decisions(tests, decided[sum(map(len, labels[:first])) :])
        sizes = encode_sizes(plan, tests, seed).inside_protocol()
        return sizes, encode_noised(plan, cells, tests, found, seed).inside_protocol()

    with without_noise():
        whole, without = summands(0), summands(1)
    for sensitivity, moved in zip(
        (plan.sizes.sensitivity, mechanism.sensitivity), zip(whole, without, strict=True), strict=True
    ):
        assert math.sqrt(sum(value * value for value in (moved[0] - moved[1]).tolist())) <= sensitivity


def test_noise_of_both_sums_is_what_is_charged() -> None:
    plan = planned(configured(2.0, groups=GROUPS))
    event, counts = plan.event(), plan.counts(plan.cells[:2])
    assert event is not None and counts is not None
    assert (event.noise_multiplier, event.sample_rate, event.steps) == (2.0, 1.0, 1)
    assert plan.sizes.noise_multiplier == counts.noise_multiplier == 2.0
    # Two attributes: a patient is in one group of each.
    assert plan.sizes.clipping_norm == pytest.approx(math.sqrt(2)) and counts.clipping_norm == 1.0
    assert event.total_variation >= counts.event(1.0, 1).total_variation
    assert event.total_variation >= plan.sizes.event(1.0, 1).total_variation
    sizes = decode_sizes(plan, torch.zeros(plan.length, dtype=torch.int64), 3)
    assert sizes.deviation == pytest.approx(
        2.0 * math.sqrt(2) * math.sqrt(3), rel=0.01
    )  # local: all of it at each of three
    assert planned(configured()).event() is None and planned(configured()).sizes.noise_multiplier == 1.0
    assert plan_groups(Config()) is None


def test_patients_with_several_records_count_once() -> None:
    plan = planned(configured(2.0, groups=GROUPS))
    tests = patients([[0, 0, 1], [2]], [[0, 0, 1], [2]])
    with without_noise():
        sizes = encode_sizes(plan, tests, Seed.from_system()).inside_protocol()
        found = encode_noised(plan, (Cell("sex", (0, 1)),), tests, decisions(tests, [0, 1, 1, 2]), Seed.from_system())
    opened = decode_sizes(plan, sizes, 3).patients
    assert opened[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 1.0], abs=1e-2)
    counted = decode_groups(plan, (Cell("sex", (0, 1)),), found.inside_protocol(), 3, None).counts[0]
    assert not isinstance(counted, Evaluation)
    assert counted.counts[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0], abs=1e-2)
    assert counted.counts.sum() == pytest.approx(1.0, abs=1e-2)


def test_what_cannot_be_is_refused() -> None:
    exact, noised = planned(configured(aggregation={"count_bound": 3})), planned(configured(2.0))
    few = patients([[0]] * 4, [[0]] * 4)
    with pytest.raises(HeadroomError, match="more test patients"):
        encode_sizes(exact, few, Seed.from_system())
    with pytest.raises(HeadroomError, match="more test records"):
        encode_exact((Cell("sex", (0,)),), few, decisions(few, [0] * 4), 3)
    with pytest.raises(ProtocolError, match="another shape"):
        decode_sizes(exact, torch.zeros(3, dtype=torch.int64), 3)
    with pytest.raises(ProtocolError, match="exceed their bound"):
        decode_sizes(exact, torch.full((exact.length,), exact.sizes.largest_sum + 1), 3)
    with pytest.raises(ProtocolError, match="another shape"):
        decode_groups(noised, noised.cells, torch.zeros(9, dtype=torch.int64), 3, None)
    with pytest.raises(ProtocolError, match="another shape"):
        decode_groups(exact, exact.cells, torch.zeros(9, dtype=torch.int64), 3, None)
    for told in (None, [1.5] * noised.length, [1] * 3, [True] * noised.length, [1 << 60] * noised.length):
        with pytest.raises(ProtocolError, match="told no sizes of groups"):
            group_sums._told(told, noised)


# ---- what is planned and charged ---------------------------------------------------------------------------------------


def test_a_run_plans_for_two_sums_and_for_one_evaluation_that_is_lost() -> None:
    config = configured(3.0)
    event = planned(config).event()
    beside = releases_beside_steps(config)
    assert [of for of in beside if of == event] == [event] * 4
    assert releases_beside_steps(config, Done(rounds=1, charged=1, evaluations=1)).count(event) == 4
    assert releases_beside_steps(config, Done(rounds=1, charged=1, evaluations=1, groups=2)).count(event) == 2
    assert releases_beside_steps(config, Done(rounds=2, charged=2, evaluations=2, groups=2)).count(event) == 0
    # Given more rounds after it was complete, it is evaluated once more.
    assert (
        releases_beside_steps(config, Done(rounds=1, charged=1, evaluations=2, ends=(1,), groups=2)).count(event) == 4
    )
    release = plan_release(config, 30, [], "hospital-0")
    assert release is not None and 59.0 < epsilon_of([*beside, release], 1e-3) <= 60.0
    assert releases_beside_steps(configured()) == []


# ---- over links --------------------------------------------------------------------------------------------------------


def prepared(config: Config, directory: Path) -> dict[str, Any]:
    """All parties of a run before its last round, with the model that all begin with."""
    parties: dict[str, Any] = {AGGREGATOR: prepare_aggregator(config)}
    for rank, name in enumerate(HOSPITALS):
        train, test = load_hospital(config, rank, "train"), load_hospital(config, rank, "test")
        parties[name] = join(config, rank, train, test, PrivacyLedger(directory / f"{name}.json", name))
    return parties


def evaluated(parties: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The evaluation of the last round at all parties."""
    names = [*HOSPITALS, AGGREGATOR]
    return run_parties_in_memory(evaluation, names, directory, parties, signatories(names, directory / "identities"))


def evaluation(links: Any, directory: Path, parties: dict[str, Any], signatory: dict[str, Signatory]) -> dict[str, Any]:
    path = directory / f"{links.name}.jsonl"
    domain = SecretDomain(
        links, [*HOSPITALS, AGGREGATOR], OpeningRecord(path, links.name), signatory=signatory[links.name]
    )
    rules, starts = Rules(AGGREGATOR, HOSPITALS, 3, 0, 60.0), {name: links.key_fingerprint(name) for name in HOSPITALS}
    own = parties[links.name]
    plan = RoundPlan(own.config.last_round, 0, HOSPITALS, starts, (), 4, False)
    if links.name == AGGREGATOR:
        hospitals, found = aggregator_evaluation(own, domain, rules, HOSPITALS, plan)
        try:
            _, line = evaluated_groups(own, domain, rules, hospitals, plan, found)
        except MpcFlError as error:
            return {"error": error, "openings": read_json_lines(path)}
        return {"whole": found, "groups": line["groups"], "openings": read_json_lines(path)}
    found = hospital_evaluation(own, domain, rules, HOSPITALS, plan)
    return {"own": found, "charged": own.ledger.records()}


def in_the_clear(parties: dict[str, Any], attribute: str, members: tuple[int, ...]) -> Evaluation:
    """What somebody with all test records finds of one group."""
    chances, labels = list[torch.Tensor](), list[torch.Tensor]()
    for name in HOSPITALS:
        hospital: Hospital = parties[name]
        rows = torch.isin(hospital.test.groups[attribute], torch.tensor(members))
        logits = predict(hospital.model, hospital.test.inputs).double()
        chances.append(torch.softmax(logits, dim=1)[rows])
        labels.append(hospital.test.labels[rows])
    return evaluate_locally(torch.cat(chances), torch.cat(labels))


def members_of(config: Config, attribute: str, group: str) -> tuple[int, ...]:
    names = next(of.groups for of in planned(config).attributes if of.name == attribute)
    return tuple(names.index(name) for name in group.split(" or "))


def test_exact_groups_are_what_all_records_together_say_and_small_ones_are_not_opened(tmp_path: Path) -> None:
    config = configured()
    parties = prepared(config, tmp_path)
    result = evaluated(parties, tmp_path)[AGGREGATOR]
    shown = result["groups"]["shown"]
    assert {of["attribute"] for of in shown} == {"sex", "age"} and len(shown) >= 5
    for of in shown:
        expected = in_the_clear(parties, of["attribute"], members_of(config, of["attribute"], of["group"]))
        assert of["scores"] == expected.to_json()
        for label, part in enumerate(of["classes"]):
            assert part["auc"]["area"] == pytest.approx(expected.areas[label], abs=1e-5)
            assert part["sensitivity"]["of"] == expected.class_counts[label]
    # About 12 patients of each attribute are unknown: too few, and the difference to all would show them.
    assert sum("or unknown" in of["group"] for of in shown) == 2
    openings = result["openings"]
    assert [of["shape"] for of in openings] == [[426], [7], [426 * len(shown)]]
    sizes, counts = openings[1], openings[2]
    assert sizes["what"] == "noised numbers of patients" and sizes["privacy"]["noise multiplier"] == 1.0
    named = counts["why"].partition("counts of groups: ")[2]
    assert "unknown" not in named.replace("or unknown", "") and "hospital-" not in named
    assert all(of["among"] == [*HOSPITALS, AGGREGATOR] and of["to"] == [AGGREGATOR] for of in openings)


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_noised_groups_with_sites_are_charged_and_show_confusion_matrices_alone(tmp_path: Path, mechanism: str) -> None:
    config = configured(2.0, 20, privacy={**PRIVACY, "mechanism": mechanism})
    parties = prepared(config, tmp_path)
    results = evaluated(parties, tmp_path)
    found, openings = results[AGGREGATOR]["groups"], results[AGGREGATOR]["openings"]
    assert [of["shape"] for of in openings] == [[9], [10], [9 * len(found["shown"])]]
    assert all(of["scores"]["noise"] > 0 and "scores" not in of["scores"] for of in found["shown"])
    assert all(part["auc"] is None for of in found["shown"] for part in of["classes"])
    assert {of["group"] for of in found["shown"] if of["attribute"] == "site"} == set(HOSPITALS)
    assert "unknown" in found["withheld"]["sex"] and "unknown" in found["withheld"]["age"]
    assert "unknown" not in openings[2]["why"]
    event = planned(config).event()
    assert event is not None
    for name in HOSPITALS:
        charged = [of for of in results[name]["charged"] if of["run"] == groups_run_name(config)]
        assert [(of["noise_multiplier"], of["released"], of["round"]) for of in charged] == [(2.0, True, 2)] * 2
        assert all(of["total_variation"] == event.total_variation for of in charged)
    for of in (of for of in found["shown"] if of["attribute"] == "site"):
        assert abs(of["scores"]["records"] - 80) < 6 * 3 * of["scores"]["noise"]  # patients, nine counts


def test_where_no_group_is_large_enough_there_is_no_second_sum(tmp_path: Path) -> None:
    result = evaluated(prepared(configured(fewest=10_000), tmp_path), tmp_path)[AGGREGATOR]
    assert len(result["openings"]) == 2 and result["groups"]["shown"] == []
    names = {of.name: list(of.groups) for of in planned(configured()).attributes}
    assert result["groups"]["withheld"] == names


def test_a_budget_that_is_spent_stops_groups_before_anything_is_sent(tmp_path: Path) -> None:
    config = configured(2.0)
    ledger = PrivacyLedger(tmp_path / "privacy.json", "hospital-0")
    hospital = join(config, 0, load_hospital(config, 0, "train"), load_hospital(config, 0, "test"), ledger)
    ledger.charge(SubsampledGaussian(0.05, 1.0, 10), run="another", round_number=1)
    plan = RoundPlan(2, 0, HOSPITALS, {}, (), 4, False)
    with pytest.raises(PrivacyBudgetError, match="would raise epsilon"):
        group_sums.own_sizes(hospital, plan)
    assert len(ledger.records()) == 1


def negative(counts: torch.Tensor) -> torch.Tensor:
    return counts - 10_000


def twice(counts: torch.Tensor) -> torch.Tensor:
    return 40 * counts  # which contradicts itself nowhere, but is more than all test patients


@pytest.mark.parametrize(("changed", "words"), [(negative, "contradicts itself"), (twice, "exceed those of all test")])
def test_impossible_counts_are_refused_as_those_of_all_patients_are(
    changed: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parties = prepared(configured(), tmp_path)
    deviating, honest = parties["hospital-1"].test, group_sums.encode_exact

    def encode(cells: Any, tests: Dataset, found: OwnDecisions, bound: int) -> Private[torch.Tensor]:
        made = honest(cells, tests, found, bound)
        return Private(made.label, changed(made.inside_protocol())) if tests is deviating else made

    monkeypatch.setattr(group_sums, "encode_exact", encode)
    result = evaluated(parties, tmp_path)[AGGREGATOR]
    assert isinstance(result["error"], ProtocolError) and words in str(result["error"])


# ---- whole runs, in both arrangements ----------------------------------------------------------------------------------


def settings(config: Config) -> dict[str, Any]:
    dumped = config.model_dump(mode="json", exclude_defaults=True)
    named = {name: dumped[name] for name in ("data", "evaluation", "privacy")}
    named["privacy"]["mechanism"] = config.privacy.mechanism  # another one than the default of these runs
    return named


def run_in_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, config: Config, *sleepers: Sleeper, **more: Any
) -> Training:
    run = Training(directory, monkeypatch, **settings(config), **more)
    run.run(*sleepers)
    return run


def test_peers_open_the_same_groups_as_an_aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups have so many patients that the noise of sizes, which is another in each run, decides nothing."""
    phantoms = {"train_patients": 90, "test_patients": 600}
    config = configured(fewest=2, data={"image_size": 8, "phantoms": phantoms})
    fixed = {**SETTINGS["training"], "sampling_seed": 1}
    led = run_in_memory(tmp_path / "led", monkeypatch, config, federation={"quorum": 3}, training=fixed)
    among = {"coordinator": "none", "quorum": 3}
    run = run_in_memory(tmp_path / "peers", monkeypatch, config, federation=among, training=fixed)
    assert set(led.said.values()) == set(run.said.values()) == {"finished"}
    of_led = read_json_lines(led.party(AGGREGATOR) / "metrics.jsonl")
    of_peers = [read_json_lines(run.party(name) / "rounds.jsonl") for name in HOSPITALS]
    assert "groups" not in of_led[0] and "groups" not in of_led[1]
    assert len(of_led[-1]["groups"]["shown"]) == 3 + 4
    for lines in of_peers:
        assert lines[-1]["evaluation"] == of_led[-1]["evaluation"]
        assert lines[-1]["groups"] == of_led[-1]["groups"]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [negative, twice])
def test_among_peers_impossible_counts_cost_the_groups_alone(
    changed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = group_sums.own_counts

    def own_counts(hospital: Hospital, *rest: Any) -> Any:
        made, release = honest(hospital, *rest)
        if hospital.name == "hospital-1":
            made = Private(made.label, changed(made.inside_protocol()))
        return made, release

    from mpc_fl.federation import peer_round

    monkeypatch.setattr(peer_round, "own_counts", own_counts)
    among = {"coordinator": "none", "quorum": 3}
    run = run_in_memory(tmp_path, monkeypatch, configured(), federation=among)
    assert set(run.said.values()) == {"finished"}
    for name in HOSPITALS:
        last = read_json_lines(run.party(name) / "rounds.jsonl")[-1]
        assert "groups" not in last and last["evaluation"] is not None
    assert any("has no groups" in line for line in run.log)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ready sizes of groups", "ready counts of groups"])
@pytest.mark.parametrize("noise", [None, 2.0])
def test_a_hospital_that_is_lost_costs_exact_groups_and_noised_ones_go_on_without_it(
    noise: float | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Sleeper("hospital-1", where, KILLED)
    run = run_in_memory(tmp_path, monkeypatch, configured(noise), lost, federation={"quorum": 2})
    assert lost.slept and run.said["hospital-1"] == "dropped"
    assert {run.said[name] for name in (AGGREGATOR, "hospital-0", "hospital-2")} == {"finished"}
    last = read_json_lines(run.party(AGGREGATOR) / "metrics.jsonl")[-1]
    assert last["evaluation"] is not None and ("groups" in last) == (noise is not None)


@pytest.mark.slow
@pytest.mark.parametrize("coordinator", ["aggregator", "none"])
def test_noised_groups_of_a_whole_run_stay_within_the_budget(
    coordinator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(2.0)
    run = run_in_memory(tmp_path, monkeypatch, config, federation={"coordinator": coordinator, "quorum": 3})
    assert set(run.said.values()) == {"finished"}
    for name in HOSPITALS:
        ledger = PrivacyLedger(run.party(name) / f"{name}-privacy.sqlite3", name)
        released = [of["run"].split()[-1] for of in ledger.records() if of["released"]]
        assert released.count("groups") == 2 and ledger.epsilon(1e-3) <= 60.0
    blocks = read_json_lines(run.party("hospital-0") / "reveal_ledger.jsonl")
    whys = [of["why"] for block in blocks for of in block.get("openings", [])]
    assert sum("sizes of groups by sex, age, site" in why for why in whys) == 1
    assert sum("noised counts of groups: " in why for why in whys) == 1
