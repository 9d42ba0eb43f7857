"""Streams of sealed chunks: what relays that lose, change, repeat and reorder can do to them is to keep chunks from arriving."""

from __future__ import annotations

import random

import pytest

from mpc_fl.errors import ProtocolError
from mpc_fl.links.sealed_stream import _MOST_KEPT, SealedStream
from mpc_fl.links.sealing import Sealer, Unsealer

KEY, BACK = bytes(range(32)), bytes(range(1, 33))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ends(clock: Clock) -> tuple[SealedStream, SealedStream]:
    """Those of a and b."""
    at_a = SealedStream(Sealer(KEY, "a", "b"), Unsealer(BACK, "b", "a"), clock)
    return at_a, SealedStream(Sealer(BACK, "b", "a"), Unsealer(KEY, "a", "b"), clock)


def sent(stream: SealedStream) -> list[bytes]:
    """All that is to be sent now, in its order."""
    found = []
    while (following := stream.next_chunk()) is not None:
        stream.was_sent(following[0])
        found.append(following[1])
    return found


def word(stream: SealedStream) -> bytes:
    stream.say()
    said = stream.word()
    assert said is not None
    return said


def test_what_was_sent_arrives_once_and_in_order_whatever_comes_twice() -> None:
    a, b = ends(Clock())
    for number in range(5):
        assert a.put(bytes([number]), 0.0)
    chunks = sent(a)
    taken = [b.take(chunk, "r") for chunk in [*chunks[:3], *chunks, *chunks]]
    assert [chunk for chunk in taken if chunk is not None] == [bytes([number]) for number in range(5)]
    assert not a.all_arrived
    assert a.take(word(b), "r") is None
    assert a.all_arrived and not a.refused_through() and sent(a) == []


def test_one_that_is_missing_is_asked_for_and_all_from_it_on_come_again() -> None:
    clock = Clock()
    a, b = ends(clock)
    for number in range(4):
        a.put(bytes([number]), 0.0)
    chunks = sent(a)
    assert b.take(chunks[0], "r") == b"\0" and b.take(chunks[2], "r") is None and b.take(chunks[3], "r") is None
    asked = b.word()
    assert asked is not None and a.take(asked, "r") is None and a.refused_through() == "r" and not a.refused_through()
    a.send_again()
    assert sent(a) == chunks[1:]  # as they were sealed: nothing is sealed twice under one number
    assert [b.take(chunk, "r") for chunk in chunks[1:]] == [b"\1", b"\2", b"\3"]


def test_one_that_was_changed_is_refused_and_ends_nothing() -> None:
    a, b = ends(Clock())
    a.put(b"chunk", 0.0)
    (chunk,) = sent(a)
    for bad in (chunk[:-1] + bytes([chunk[-1] ^ 1]), chunk[:8] + bytes(20), chunk[:3], word(b)):
        with pytest.raises(ProtocolError, match="was changed"):
            b.take(bad, "r")
    asked = b.word()
    assert asked is not None and a.take(asked, "r") is None and a.refused_through() == "r"
    a.send_again()
    assert [b.take(chunk, "r") for chunk in sent(a)] == [b"chunk"]


def test_the_same_chunk_is_not_asked_for_with_each_that_follows() -> None:
    clock = Clock()
    a, b = ends(clock)
    for number in range(4):
        a.put(bytes([number]), 0.0)
    chunks = sent(a)
    b.take(chunks[2], "r")
    first = b.word()
    assert first is not None and a.take(first, "r") is None and a.refused_through() == "r"
    b.take(chunks[3], "r")
    assert b.word() is None
    clock.now += 1.5
    b.take(chunks[3], "r")
    second = b.word()
    assert second is not None and a.take(second, "r") is None and a.refused_through() == "r"


def test_a_word_said_again_is_no_sign_of_life_and_takes_nothing_back() -> None:
    a, b = ends(Clock())
    a.put(b"chunk", 0.0)
    early = word(b)
    b.take(sent(a)[0], "r")
    late = word(b)
    a.take(late, "r")
    assert a.heard() and a.all_arrived
    a.take(early, "r")
    a.take(late, "r")
    assert not a.heard() and a.all_arrived


def test_a_word_that_says_too_much_is_refused() -> None:
    a, b = ends(Clock())
    b._taken = 3
    with pytest.raises(ProtocolError, match="more sealed chunks were taken than there are"):
        a.take(word(b), "r")


def test_no_more_is_kept_than_there_is_room_for() -> None:
    a, b = ends(Clock())
    assert all(a.put(b"", 0.0) for _ in range(_MOST_KEPT)) and not a.put(b"", 0.0)
    for chunk in sent(a):
        b.take(chunk, "r")
    a.take(word(b), "r")
    assert a.put(b"", 0.0)
    large, _ = ends(Clock())
    count = 0
    while large.put(bytes(2 << 20), 0.0):
        count += 1
    assert count == 8


def test_a_stream_that_gets_on_is_not_stuck() -> None:
    clock = Clock()
    a, b = ends(clock)
    clock.now = 100.0
    assert not a.stuck(10.0)
    a.put(b"one", 0.0)
    a.put(b"two", 0.0)
    first, _ = sent(a)
    clock.now += 9.0
    b.take(first, "r")
    a.take(word(b), "r")
    clock.now += 9.0
    assert not a.stuck(10.0)
    clock.now += 1.0
    assert a.stuck(10.0)
    a.send_again()
    assert not a.stuck(10.0)


@pytest.mark.parametrize("seed", range(20))
def test_with_relays_that_do_what_they_like_all_arrives_if_one_is_honest(seed: int) -> None:
    """Each chunk and word goes through one that loses, changes, repeats or keeps it for later, or through the honest one."""
    draw, clock = random.Random(seed), Clock()
    a, b = ends(clock)
    wanted, got, later = [bytes([draw.randrange(256)]) * draw.randrange(5) for _ in range(60)], list[bytes](), []
    to_put = list(wanted)

    def carried(sealed: bytes) -> list[bytes]:
        match draw.choice(["honest", "honest", "lost", "changed", "twice", "later"]):
            case "honest":
                return [sealed]
            case "lost":
                return []
            case "changed":
                place = draw.randrange(len(sealed))
                return [sealed[:place] + bytes([sealed[place] ^ (1 << draw.randrange(8))]) + sealed[place + 1 :]]
            case "twice":
                return [sealed, sealed]
        later.append(sealed)
        return [later.pop(draw.randrange(len(later)))] if draw.random() < 0.5 else []

    for _ in range(4000):
        clock.now += 0.3
        if to_put and a.put(to_put[0], 0.0):
            to_put.pop(0)
        if a.refused_through() == "r" or a.stuck(2.0):
            a.send_again()
        for sealed in [chunk for chunk in sent(a) for chunk in carried(chunk)]:
            try:
                chunk = b.take(sealed, "r")
            except ProtocolError:
                continue
            if chunk is not None:
                got.append(chunk)
        b.say_after(1.0)
        if (said := b.word()) is not None:
            for sealed in carried(said):
                try:
                    assert a.take(sealed, "r") is None
                except ProtocolError:
                    continue
        if not to_put and a.all_arrived:
            break
    assert got == wanted and a.all_arrived
