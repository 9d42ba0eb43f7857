"""Which plans a hospital takes up: none twice, none beyond the rules, none for a model that it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpc_fl.aggregation.rules import Rules
from mpc_fl.aggregation.words import next_word
from mpc_fl.config.config import parse_config
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.attendance import PlansFollowed, RoundPlan
from mpc_fl.federation.distribution import receive_model
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.learning.models.parameters import flatten_buffers, flatten_parameters
from tests.support.harness import run_parties_in_memory

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2")
ME = "hospital-0"


def plan(number: int, attempt: int = 0, newcomers: tuple[str, ...] = (), weight_total: int = 4) -> RoundPlan:
    return RoundPlan(number, attempt, HOSPITALS, dict.fromkeys(HOSPITALS, "0" * 64), newcomers, weight_total, False)


def followed(*plans: RoundPlan, kept: int = -1) -> PlansFollowed:
    plans_followed = PlansFollowed(Rules("aggregator", HOSPITALS, 2, 2, 60.0), 3, 1 << 20, kept)
    for each in plans:
        plans_followed.follow(each, ME)
    return plans_followed


BEGIN = plan(0, newcomers=HOSPITALS)


def test_an_honest_run_is_followed() -> None:
    assert followed(BEGIN, plan(1), plan(2), plan(2, 1, HOSPITALS), plan(3), plan(4)).round_of == (4, 0)
    assert followed(plan(2, newcomers=HOSPITALS), kept=2).round_of == (2, 0)  # made anew: it was not signed


@pytest.mark.parametrize(
    ("next_plan", "why"),
    [
        (plan(1), r"planned round 1 \(attempt 0\) after round 1"),
        (plan(0), "planned round 0"),
        (plan(5), "planned round 5"),
        (plan(2, 3), "began round 2 anew too often"),
        (plan(2, -1), "began round 2 anew too often"),
        (plan(2, weight_total=3), "total of weights"),
        (plan(2, weight_total=1 << 21), "total of weights"),
        (plan(2, weight_total=0), "total of weights"),
        (plan(2, newcomers=("hospital-9",)), "newcomers"),
    ],
)
def test_what_is_not_followed(next_plan: RoundPlan, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        followed(BEGIN, plan(1), next_plan)


def test_what_comes_before_the_first_round_is_begun_anew_as_often_as_hospitals_can_be_lost() -> None:
    again = [plan(0, attempt, HOSPITALS) for attempt in (1, 2, 3)]
    assert followed(BEGIN, *again[:2], plan(1)).round_of == (1, 0)
    with pytest.raises(ProtocolError, match="began round 0 anew too often"):
        followed(BEGIN, *again)


def test_who_missed_a_round_must_be_given_the_model() -> None:
    """Else its sum would be bound to a model that it was sent in the middle of a round, and dropped with the round."""
    plans = followed(BEGIN, plan(1))
    plans.behind = True
    with pytest.raises(ProtocolError, match="did not give hospital-0 the model of the round before"):
        plans.follow(plan(2), ME)
    plans.follow(plan(2, newcomers=(ME,)), ME)
    with pytest.raises(ProtocolError, match="did not give hospital-0 the model"):
        followed(plan(0))


@pytest.mark.parametrize("start", [5, "", "0" * 63, None])
def test_starts_that_are_no_fingerprints_are_no_plan(start: Any) -> None:
    word = {"number": 1, "attempt": 0, "weight_total": 4, "newcomers": [], "hospitals": list(HOSPITALS)}
    with pytest.raises(ProtocolError, match="no plan of a round"):
        RoundPlan.from_word({**word, "starts": {**dict.fromkeys(HOSPITALS, "0" * 64), "hospital-1": start}})


def _hear(links: Any, word: Any) -> str:
    if links.name == "aggregator":
        links.send_object(ME, "word", {"word": word})
        return ""
    try:
        next_word(links, "aggregator", ("plan",))
    except ProtocolError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("word", ["end", 5, ["plan"], {"plan": []}, None])
def test_a_word_that_is_none_is_refused_in_one_line(word: Any) -> None:
    said = run_parties_in_memory(_hear, [ME, "aggregator"], word)[ME]
    assert said.startswith("aggregator said ") and "instead of plan" in said


def _own_layers(links: Any, hospital: Hospital) -> None:
    model = hospital.model
    if links.name == "aggregator":
        links.send_tensor(ME, "parameters", torch.zeros_like(flatten_parameters(model)))
        links.send_tensor(ME, "statistics", flatten_buffers(model))
    else:
        receive_model(hospital, links, False)


def test_own_layers_are_not_the_aggregators_to_choose(tmp_path: Any) -> None:
    """With `training.local_normalisation`: they are in no transcript, and a dead one would single out another's update."""
    from mpc_fl.federation.hospital_state import join
    from mpc_fl.learning.data.loading import load_hospital
    from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger

    values = {
        "data": {"image_size": 16, "phantoms": {"train_patients": 30, "test_patients": 9}},
        "model": {"architecture": "small_cnn", "normalisation": "group"},
        "training": {"local_normalisation": True},
        "privacy": {"mechanism": "none"},
    }
    config = parse_config(values, "test")
    train, test = load_hospital(config, 0, "train"), load_hospital(config, 0, "test")
    hospital = join(config, 0, train, test, PrivacyLedger(tmp_path / "ledger", ME))
    before = flatten_parameters(hospital.model).clone()
    run_parties_in_memory(_own_layers, [ME, "aggregator"], hospital)
    after, own = flatten_parameters(hospital.model), ~hospital.coordinates
    assert int(own.sum()) > 0 and torch.equal(after[own], before[own])
    assert bool((after[hospital.coordinates] == 0).all())
