"""Who may hold a stream, and how refusals are logged."""

from __future__ import annotations

import contextlib
import logging

import pytest

from mpc_fl.errors import RefusedError
from mpc_fl.links.places import Places, Refusals


def test_the_oldest_silent_stream_of_a_certificate_makes_room() -> None:
    places, ended = Places(8), list[int]()
    with contextlib.ExitStack() as streams:
        for number in range(5):
            streams.enter_context(places.silent(b"one", lambda number=number: ended.append(number)))
        streams.enter_context(places.silent(b"other", lambda: ended.append(99)))
        assert ended == [0, 1]
    with places.silent(b"one", lambda: ended.append(100)):
        assert ended == [0, 1], "those that have greeted or ended do not count"


def test_of_many_certificates_the_greediest_makes_room() -> None:
    places, ended = Places(8), list[str]()
    with contextlib.ExitStack() as streams:
        for certificate in range(7):
            for number in range(3 if certificate == 0 else 2):
                end = f"{certificate}.{number}"
                streams.enter_context(places.silent(bytes([certificate]), lambda end=end: ended.append(end)))
        assert not ended
        for certificate in range(7, 9):
            streams.enter_context(places.silent(bytes([certificate]), lambda: None))
    assert ended == ["0.0"]


def test_all_peers_of_a_large_federation_may_come_at_once() -> None:
    places, ended = Places(2 * 64 + 4), list[int]()
    with contextlib.ExitStack() as streams:
        for peer in range(64):
            streams.enter_context(places.silent(bytes([peer]), lambda peer=peer: ended.append(peer)))
    assert not ended


def test_no_certificate_holds_all_places() -> None:
    places = Places(8)
    with contextlib.ExitStack() as streams:
        for _ in range(4):
            streams.enter_context(places.held(b"one"))
        with pytest.raises(RefusedError, match="all places for links are taken: come back"):
            streams.enter_context(places.held(b"one"))
        for _ in range(4):
            streams.enter_context(places.held(b"other"))
        with pytest.raises(RefusedError):
            streams.enter_context(places.held(b"third"))
    with places.held(b"one"):
        pass


def test_refusals_are_counted_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refusals = Refusals(logging.getLogger("test"))
    for number in range(11_000):
        refusals.count("refused a link (b): revoked", f"refused a link from port {number} (b): revoked")
    refusals.count("refused a link (c): expired", "refused a link from port 1 (c): expired")
    refusals.close()
    assert [record.message for record in caplog.records] == [
        "refused a link from port 0 (b): revoked",
        *[f"refused a link from port {n - 1} (b): revoked (number {n} of this kind)" for n in (10, 100, 1000, 10_000)],
        "refused a link from port 1 (c): expired",
        "in all 11000 times: refused a link (b): revoked",
    ]


def test_an_attacker_cannot_make_kinds_without_end(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(logging.getLogger("test"))
    for number in range(11_000):
        refusals.count(f"used as {number}", f"used as {number}")
    refusals.close()
    assert len(caplog.records) < 120
