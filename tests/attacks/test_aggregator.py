"""An aggregator that deviates: isolated sets, two sets, two models, repeated plans, crashes at the worst moment.

What it received of summands is tested as uniform; every honest hospital ends with one line that names it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.support.deviating import HOSPITALS, Federation

pytestmark = pytest.mark.processes
FALSE_ALARM = 1e-7
QUORUM = {"federation": {"quorum": 2}}
# A network large enough for its summands to be tested as uniform.
LARGE = {"model": {"architecture": "mlp", "hidden": [200]}}


# ---- what a deviating aggregator does, in its own process ---------------------------------------------------------------


def _keep_summands(evidence: Path) -> None:
    """Write every tensor that arrives as a summand to a file of its own."""
    from mpc_fl.links.links import Links

    receive, count = Links.receive_tensor, itertools.count()

    def kept(links: Links, sender: str, tag: str, *arguments: Any, **named: Any) -> torch.Tensor:
        tensor = receive(links, sender, tag, *arguments, **named)
        if "summand" in tag or "keys" in tag:
            np.save(evidence / f"{next(count):03d} {sender} {tag}.npy", tensor.numpy())
        return tensor

    Links.receive_tensor = kept  # type: ignore[method-assign]


def _change_plan(evidence: Path, of_round: int, **changes: Any) -> None:
    """Tell hospital-0 another plan of a round than the others."""
    from mpc_fl.aggregation import words
    from mpc_fl.federation import attendance

    _keep_summands(evidence)
    say = words.say

    def told(links: Any, names: Any, word: str, **values: Any) -> None:
        if word != "plan" or values["number"] != of_round:
            say(links, names, word, **values)
            return
        say(links, [name for name in names if name != "hospital-0"], word, **values)
        changed = {**values, **changes}
        changed["starts"] = {name: values["starts"].get(name, "0" * 64) for name in changed["hospitals"]}
        say(links, ["hospital-0"], word, **changed)

    attendance.say = told


def alone(evidence: Path) -> None:
    _change_plan(evidence, 1, hospitals=["hospital-0"])


def with_a_party_that_is_no_hospital(evidence: Path) -> None:
    _change_plan(evidence, 1, hospitals=["hospital-0", "hospital-1", "aggregator"])


def with_hospitals_that_are_not_there(evidence: Path) -> None:
    _change_plan(evidence, 1, hospitals=["hospital-0", "hospital-1", "hospital-7"])


def with_itself_twice(evidence: Path) -> None:
    _change_plan(evidence, 1, hospitals=["hospital-0", "hospital-0", "hospital-1"])


def without_the_one_asked(evidence: Path) -> None:
    _change_plan(evidence, 1, hospitals=["hospital-1", "hospital-2"])


def before_the_first_round(evidence: Path) -> None:
    """The same for the sums over all hospitals that come before the first round."""
    _change_plan(evidence, 0, hospitals=["hospital-0"])


def with_weights_that_silence(evidence: Path) -> None:
    _change_plan(evidence, 1, weight_total=2**60)


def with_weights_that_are_no_power_of_two(evidence: Path) -> None:
    _change_plan(evidence, 1, weight_total=96)


def with_a_round_that_was(evidence: Path) -> None:
    _change_plan(evidence, 2, number=1)


def with_a_round_that_cannot_be(evidence: Path) -> None:
    _change_plan(evidence, 1, number=7)


def with_attempts_without_end(evidence: Path) -> None:
    _change_plan(evidence, 1, attempt=3)


def two_sets(evidence: Path) -> None:
    """Hospital 0 hears that all are in the sum, the others that they are alone in it; nobody's confirmation is checked."""
    from mpc_fl.aggregation import quorum_sum

    _keep_summands(evidence)
    say, plan, label = quorum_sum.say, quorum_sum.plan_of, [""]

    def planned(links: Any, rules: Any, agreed: Any, *more: Any) -> Any:
        label[0] = agreed.label[0]
        return plan(links, rules, agreed, *more)

    def told(links: Any, names: Any, word: str, **values: Any) -> None:
        if word == "fixed" and label[0] == "update":
            say(links, ["hospital-0"], word, hospitals=list(HOSPITALS))
            say(links, ["hospital-1", "hospital-2"], word, hospitals=["hospital-1", "hospital-2"])
            return
        say(links, names, word, **values)

    quorum_sum.say, quorum_sum.plan_of = told, planned
    _believe_every_confirmation()


def _believe_every_confirmation() -> None:
    """And every commitment: this aggregator does not care."""
    from mpc_fl.aggregation import quorum_sum
    from mpc_fl.sharing.closed_sum import KeyCommitments

    KeyCommitments.take = KeyCommitments.require = lambda *_: None  # type: ignore[method-assign]

    def believed(_domain: Any, _hospital: str, _transcript: str, _admitted: Any, word: Any) -> str:
        return str(word["confirmation"])

    quorum_sum.require_confirmation = believed


def two_models(evidence: Path) -> None:
    """Hospitals 1 and 2 are given a dead model, so that the sum would be hospital 0's update."""
    from mpc_fl.links.links import Links

    _keep_summands(evidence)
    _believe_every_confirmation()
    send = Links.send_tensor

    def sent(links: Links, receiver: str, tag: str, tensor: torch.Tensor) -> None:
        send(links, receiver, tag, tensor * 0 if tag == "parameters" and receiver != "hospital-0" else tensor)

    Links.send_tensor = sent  # type: ignore[method-assign]


def two_models_within_a_round(evidence: Path) -> None:
    """With distributed noise: after the first step hospital 1 is given another model than the others."""
    from mpc_fl.links.links import Links

    _keep_summands(evidence)
    _believe_every_confirmation()
    send = Links.send_tensor

    def sent(links: Links, receiver: str, tag: str, tensor: torch.Tensor) -> None:
        send(links, receiver, tag, tensor * 0 if tag == "global model" and receiver == "hospital-1" else tensor)

    Links.send_tensor = sent  # type: ignore[method-assign]


def dies_when_all_summands_are_there(_evidence: Path) -> None:
    from mpc_fl.sharing.closed_sum import ClosedSum

    take = ClosedSum.take

    def taken(closed: ClosedSum, hospital: str, summand: torch.Tensor) -> None:
        take(closed, hospital, summand)
        if closed.plan.label[0] == "update" and len(closed.present) == len(closed.plan.hospitals):
            os.kill(os.getpid(), signal.SIGKILL)

    ClosedSum.take = taken  # type: ignore[method-assign]


# ---- what it gets ------------------------------------------------------------------------------------------------------


def _received(evidence: Path, kind: str) -> dict[str, np.ndarray]:
    return {path.stem[4:]: np.load(path) for path in sorted(evidence.glob("*.npy")) if f" {kind} " in path.stem}


def _uniform(words: np.ndarray) -> float:
    digits = np.bincount((words.reshape(-1).view(np.uint32) >> 24).astype(np.int64), minlength=256)
    return float(stats.chisquare(digits).pvalue)


PLANS = {
    alone: "over 1 of the hospitals, fewer than 3",
    with_a_party_that_is_no_hospital: "over parties that are not, or not only, the hospitals of this run",
    with_hospitals_that_are_not_there: "over parties that are not, or not only, the hospitals of this run",
    with_itself_twice: "over parties that are not, or not only, the hospitals of this run",
    without_the_one_asked: "over parties that are not, or not only, the hospitals of this run",
    before_the_first_round: "over 1 of the hospitals, fewer than 3",
    with_weights_that_silence: "a total of weights that cannot be",
    with_weights_that_are_no_power_of_two: "a total of weights that cannot be",
    with_a_round_that_was: r"planned round 1 \(attempt 0\) after round 1",
    with_a_round_that_cannot_be: r"planned round 7 \(attempt 0\) after round 0",
    with_attempts_without_end: "began round 1 anew too often",
}


@pytest.mark.parametrize(
    "deviation",
    [
        pytest.param(each, marks=() if each in (alone, with_weights_that_silence) else pytest.mark.slow)
        for each in PLANS
    ],
    ids=lambda each: each.__name__,
)
def test_a_plan_that_may_not_be_is_refused_before_anything_is_sent(deviation: Any, tmp_path: Path) -> None:
    import re

    federation = Federation(tmp_path)
    said = federation.run({"aggregator": deviation})
    assert re.search(PLANS[deviation], said["hospital-0"]), said
    assert "aggregator does not follow the protocol" in said["hospital-0"] and "\n" not in said["hospital-0"]
    mine = [name for name in _received(federation.evidence, "summand") if name.startswith("hospital-0 ")]
    rounds_before = 1 if deviation is with_a_round_that_was else 0
    assert len([name for name in mine if "summand update" in name]) == rounds_before
    assert len(federation.charges("hospital-0")) == rounds_before
    if deviation is before_the_first_round:
        assert not mine


def test_hospitals_that_are_told_two_sets_open_one_at_most(tmp_path: Path) -> None:
    federation = Federation(tmp_path, **QUORUM, **LARGE)
    said = federation.run({"aggregator": two_sets})
    assert "aggregator has no confirmation by hospital-1 of the sum that hospital-0 is in" in said["hospital-0"], said
    keys = _received(federation.evidence, "keys")
    assert not [name for name in keys if name.startswith("hospital-0 keys update")]
    # Its summand arrived and was charged, though it was never opened.
    summands = _received(federation.evidence, "summand").items()
    (mine,) = [value for name, value in summands if name.startswith("hospital-0 summand update")]
    assert _uniform(mine) > FALSE_ALARM
    assert len(federation.charges("hospital-0")) == 1
    assert not [each for each in federation.openings("hospital-0") if each["what"] == "sum of weighted updates"]


@pytest.mark.parametrize("quorum", [2, None])
def test_hospitals_that_are_given_two_models_show_nothing(quorum: int | None, tmp_path: Path) -> None:
    federation = Federation(tmp_path, **LARGE, federation={"quorum": quorum}, aggregation={"weighted": False})
    said = federation.run({"aggregator": two_models})
    assert "aggregator has no confirmation by hospital-1 of the sum that hospital-0 is in" in said["hospital-0"], said
    summands = {name: value for name, value in _received(federation.evidence, "summand").items() if " update " in name}
    if quorum is None:
        assert not summands  # nothing left before all had confirmed
    for size in range(1, len(summands) + 1):
        for chosen in itertools.combinations(summands.values(), size):
            assert _uniform(np.sum(chosen, axis=0, dtype=np.int32)) > FALSE_ALARM
    assert not _received(federation.evidence, "keys")


@pytest.mark.slow
def test_models_of_inner_steps_are_bound_too(tmp_path: Path) -> None:
    noise = {"mechanism": "distributed", "noise_multiplier": 4.0, "delta": 1e-3, "epsilon": 50.0}
    federation = Federation(tmp_path, **LARGE, privacy=noise, aggregation={"weighted": False})
    said = federation.run({"aggregator": two_models_within_a_round})
    assert "aggregator has no confirmation by hospital-1" in said["hospital-0"], said
    opened = [each["why"] for each in federation.openings("hospital-0") if "noised gradient" in each["why"]]
    assert opened == ["round 1 step 1: noised gradient"]


def test_what_was_sent_stays_charged_when_the_aggregator_dies_then(tmp_path: Path) -> None:
    """Three releases of round 1: each was determined once its summands were sent, and each is in the ledger."""
    federation = Federation(tmp_path)
    for attempt in range(3):
        federation.run({"aggregator": dies_when_all_summands_are_there}, resume=attempt > 0)
        for name in HOSPITALS:
            charged = federation.charges(name)
            assert [record["round"] for record in charged] == [1] * (attempt + 1), (attempt, charged)


def test_the_aggregator_itself_finds_that_a_hospital_confirmed_something_else(tmp_path: Path) -> None:
    """So a hospital cannot have the aggregator blamed: an honest one checks every confirmation before it passes it on."""
    federation = Federation(tmp_path)
    said = federation.run({"hospital-1": confirms_something_else})
    assert "hospital-1 confirmed another sum than aggregator leads" in said["aggregator"], said
    for name in ("hospital-0", "hospital-2"):
        assert "hospital-1 confirmed another sum" in said[name], said


def confirms_something_else(_evidence: Path) -> None:
    from mpc_fl.aggregation import quorum_sum

    confirm = quorum_sum.confirm
    quorum_sum.confirm = lambda domain, _transcript, admitted: confirm(domain, "0" * 64, admitted)


def test_a_hospital_that_sends_a_false_key_is_named(tmp_path: Path) -> None:
    federation = Federation(tmp_path, **QUORUM)
    said = federation.run({"hospital-1": sends_a_false_key})
    assert "hospital-1 sent another key of" in said["aggregator"], said
    assert all("hospital-1 sent another key of" in said[name] for name in ("hospital-0", "hospital-2")), said
    assert json.dumps(said).count("(a defect") == 0


def sends_a_false_key(_evidence: Path) -> None:
    from mpc_fl.sharing.closed_sum import SummandMasks

    keys_for = SummandMasks.keys_for

    def false(masks: SummandMasks, *arguments: Any) -> torch.Tensor:
        keys = keys_for(masks, *arguments)
        keys[0, 0] ^= 1
        return keys

    SummandMasks.keys_for = false  # type: ignore[method-assign]


def blames_another(_evidence: Path) -> None:
    """It stops in round 1, and says that hospital-0 is the reason."""
    from mpc_fl.aggregation import quorum_sum
    from mpc_fl.errors import PeerLostError

    def confirm(*_: Any) -> str:
        raise PeerLostError("hospital-0", "lost hospital-0 in phase 'round 1 aggregation'")

    quorum_sum.confirm = confirm


def test_a_hospital_that_stops_takes_nobody_with_it_whom_it_blames(tmp_path: Path) -> None:
    """Before, whom it named was left out as if it were lost: too few were left, and an honest hospital was to blame."""
    federation = Federation(tmp_path, **QUORUM)
    said = federation.run({"hospital-2": blames_another})
    assert {said[name] for name in ("aggregator", "hospital-0", "hospital-1")} == {"finished"}, said
    rounds = [json.loads(line) for line in (federation.party("aggregator") / "metrics.jsonl").read_text().splitlines()]
    assert [line["hospitals"] for line in rounds[1:]] == [["hospital-0", "hospital-1"]] * 2
