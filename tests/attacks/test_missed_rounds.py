"""An aggregator that goes on with a hospital as if that had not missed a round, or chooses layers that are the hospital's own.

With distributed noise a hospital is sent a model after every step. One that misses the rest of a round drops what it was sent:
a sum that it made from the round's first model, bound to the model of a later step, would be one of two models in one sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.federation.checkpoint import load_checkpoint
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.models.batch_norm import normalisation_state
from tests.attacks.test_aggregator import _keep_summands
from tests.support.deviating import HOSPITALS, Federation

pytestmark = pytest.mark.processes
NOISE = {"mechanism": "distributed", "noise_multiplier": 4.0, "delta": 1e-3, "epsilon": 50.0}
SECOND_STEP = ("gradient", 1, 0, 1)


def _goes_on_with_all(evidence: Path) -> None:
    """To it all hospitals were in every round, so none of them is a newcomer who is given the model again."""
    from mpc_fl.federation.attendance import Attendance

    _keep_summands(evidence)

    def keep(attendance: Attendance, _: tuple[str, ...]) -> None:
        attendance.members = HOSPITALS

    Attendance.keep = keep  # type: ignore[method-assign]


def leaves_it_out(evidence: Path) -> None:
    """As if the summand of hospital-0 had not come in step 2 of round 1."""
    from mpc_fl.sharing.closed_sum import ClosedSum

    _goes_on_with_all(evidence)
    take = ClosedSum.take

    def taken(closed: ClosedSum, hospital: str, summand: torch.Tensor) -> None:
        if hospital != "hospital-0" or closed.plan.label[:4] != SECOND_STEP:
            take(closed, hospital, summand)

    ClosedSum.take = taken  # type: ignore[method-assign]


def says_that_the_sum_is_void(evidence: Path) -> None:
    """Hospital-0 alone hears that, the others open the sum of step 2 without it."""
    from mpc_fl.aggregation import quorum_sum

    leaves_it_out(evidence)
    say, plan, label = quorum_sum.say, quorum_sum.plan_of, [()]

    def planned(links: Any, rules: Any, agreed: Any, *more: Any) -> Any:
        label[0] = agreed.label
        return plan(links, rules, agreed, *more)

    def told(links: Any, names: Any, word: str, **values: Any) -> None:
        if word == "fixed" and label[0] == SECOND_STEP:
            say(links, ["hospital-0"], "fixed", **{**values, "hospitals": list(HOSPITALS)})
            say(links, ["hospital-0"], "void")
            names = [name for name in names if name != "hospital-0"]
        say(links, names, word, **values)

    quorum_sum.say, quorum_sum.plan_of = told, planned


@pytest.mark.parametrize("deviation", [leaves_it_out, says_that_the_sum_is_void], ids=lambda each: each.__name__)
def test_who_missed_a_round_goes_on_with_no_model_that_it_dropped(deviation: Any, tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, privacy=NOISE, federation={"quorum": 2}, aggregation={"weighted": False}, training={"rounds": 3}
    )
    said = federation.run({"aggregator": deviation})
    assert "aggregator did not give hospital-0 the model of the round before" in said["hospital-0"], said
    assert "aggregator does not follow the protocol; nothing was sent to it" in said["hospital-0"]
    # Both steps of round 1 left it and are charged, once; nothing of round 2 did.
    mine = sorted(
        path.stem[4:] for path in federation.evidence.glob("*.npy") if " hospital-0 summand gradient" in path.stem
    )
    assert mine == ["hospital-0 summand gradient 1 0 0 0", "hospital-0 summand gradient 1 0 1 0"]
    assert [record["round"] for record in federation.charges("hospital-0")] == [1]


def kills_own_layers(_evidence: Path) -> None:
    """With FedBN: hospitals are given layers of nothing where each has its own, so that their updates vanish or stand out."""
    from mpc_fl.federation import aggregator_program
    from mpc_fl.learning.models.parameters import shared_coordinates
    from mpc_fl.links.links import Links

    send_model, send = aggregator_program.send_model, Links.send_tensor

    def sent(aggregator: Any, links: Links, names: tuple[str, ...]) -> None:
        shared = shared_coordinates(aggregator.model, True)
        assert 0 < int(shared.sum()) < len(shared)

        def changed(links: Links, receiver: str, tag: str, tensor: torch.Tensor) -> None:
            send(links, receiver, tag, tensor * shared if tag == "parameters" else tensor)

        Links.send_tensor = changed  # type: ignore[method-assign]
        try:
            send_model(aggregator, links, names)
        finally:
            Links.send_tensor = send  # type: ignore[method-assign]

    aggregator_program.send_model = sent


def test_an_aggregator_chooses_no_layers_that_are_a_hospitals_own(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path,
        data={"image_size": 16, "phantoms": {"train_patients": 30, "test_patients": 9}},
        model={"architecture": "small_cnn", "normalisation": "group"},
        training={"rounds": 1, "local_steps": 2, "batch_size": 16, "local_normalisation": True},
        privacy={"mechanism": "none"},
    )
    said = federation.run({"aggregator": kills_own_layers})
    assert set(said.values()) == {"finished"}, said
    own = normalisation_state(initial_model(federation.config))
    for name in HOSPITALS:
        config = federation.placed[name]
        kept = load_checkpoint(federation.party(name), config, 0)  # as it was given, before the first step
        assert kept is not None
        for layer, value in own.items():
            assert torch.equal(kept.tensors[layer], value), (name, layer)
