"""Deadlines nest: whoever waits for somebody that waits allows for that wait, whatever is configured."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.aggregation.peer_norm_check import PeerNormCheck
from mpc_fl.config.config import connect_seconds, parse_config
from mpc_fl.config.deadlines import deadlines_of, peer_deadlines_of

SECONDS = st.floats(0.1, 1e4)


@given(SECONDS, SECONDS, st.none() | SECONDS, st.integers(2, 64), st.data())
def test_deadlines_nest(
    connect: float, receive: float, round_: float | None, hospitals: int, data: st.DataObject
) -> None:
    quorum = data.draw(st.none() | st.integers(2, hospitals))
    mechanism = data.draw(st.sampled_from(["none", "distributed"]))
    values = {
        "runtime": {"connect_timeout": connect, "receive_timeout": receive},
        "federation": {"hospitals": hospitals, "quorum": quorum, "round_timeout": round_},
        "privacy": {"mechanism": mechanism},
    }
    config = parse_config(values, "test")
    found = deadlines_of(config)
    assert connect < found.connect == connect_seconds(config)
    assert (found.answer, found.summand) == (receive, receive if round_ is None else round_)
    assert found.receive("aggregator") == found.answer and found.receive("hospital-1") == found.word
    # While the aggregator takes summands two at a time it may say nothing for this long, and one answer more to what follows.
    assert found.word >= found.summand + found.answer * hospitals / 2 + found.answer
    assert found.keys < found.answer
    # Hospitals wait for those that never come, then read their data.
    assert found.announcement >= found.connect + found.summand
    # A hospital that waits for a plan outlasts the start of all others, and a round.
    assert found.plan > found.connect + found.announcement and found.plan > found.word
    assert all(value > 0 for value in dataclasses.astuple(found))


@given(SECONDS, SECONDS, st.none() | SECONDS, st.integers(3, 64), st.booleans())
def test_deadlines_among_peers_nest(
    connect: float, receive: float, round_: float | None, hospitals: int, checked: bool
) -> None:
    values = {
        "aggregation": {"norm_check": checked},
        "runtime": {"connect_timeout": connect, "receive_timeout": receive},
        "federation": {"hospitals": hospitals, "coordinator": "none", "round_timeout": round_},
    }
    config = parse_config(values, "test")
    found = peer_deadlines_of(config)
    assert (found.connect, found.answer) == (connect_seconds(config), receive)
    assert found.summand == (receive if round_ is None else round_)
    assert found.beginning >= found.connect + found.summand
    # Transcript, summands, five answers until V is fixed, seven steps, keys: the last one that gives up a sum is still awaited.
    assert found.presence > found.summand + 14 * found.answer
    if checked:  # and what all heard, and the steps of the check
        assert found.presence >= found.summand + (14 + 2 + PeerNormCheck.steps) * found.answer
    # Whoever waits for a proposal outlasts who waits for others before it proposes, and what it then sends.
    assert found.beyond > found.answer
