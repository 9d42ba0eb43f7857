"""Two parties that can only dial out, and two relays of which one deviates or is lost: the two lose nothing but time.

Real links over mutual TLS. 'a' and 'b' reach each other through 'r' and 's'; any of them may be lost and come back.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import PeerLostError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import Route, relayed_route, routes
from mpc_fl.links.settings import Reach, Tolerance
from tests.support.harness import Options, free_ports, local_links
from tests.support.training_over_links import KilledError, kill_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
NAMES = ["a", "b", "r", "s"]
FIRST, OTHER = relayed_route("a", "b", ["r", "s"]).relays  # the relay that a and b use as long as it works
PIECES, LENGTH = 12, 200_000
Party = Callable[[NetworkLinks], Any]


class Meeting:
    """The four, each a thread; `outcomes` by name: what each returned or raised. Relays end when a and b have."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_local_identities(NAMES, {name: directory / name for name in NAMES})
        self.ports = dict(zip(["r", "s"], free_ports(2), strict=True))
        self.links: dict[str, NetworkLinks] = {}
        self.outcomes: dict[str, Any] = {}
        self.over = threading.Event()
        self.made = {name: threading.Event() for name in NAMES}

    def links_of(self, name: str) -> NetworkLinks:
        tolerated = [other for other in NAMES if other != name]
        options = {"relay": ["r", "s"], "tolerated": tolerated, "another_relay": 1.0}
        return local_links(name, NAMES, self.ports, self.directory, **options)

    def await_made(self) -> None:
        """Until all have made their links: before that none may be lost."""
        for name, made in self.made.items():
            assert made.wait(60), name

    def run(
        self,
        prepare: Callable[[NetworkLinks], None] = lambda relay: None,
        prepared: Sequence[str] = (FIRST,),
        **parties: Party,
    ) -> dict[str, Any]:
        """`prepare` is given the links of these relays before they are made; by itself of that which is used first."""
        for name in ("r", "s"):
            parties.setdefault(name, lambda links: self.over.wait(120))

        def run(name: str) -> None:
            self.links[name] = links = self.links_of(name)
            if name in prepared:
                prepare(links)
            try:
                with links:
                    self.made[name].set()
                    self.outcomes[name] = parties[name](links)
            except KilledError:
                self.outcomes[name] = "killed"
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.outcomes[name] = error

        threads = {name: threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in NAMES}
        for thread in threads.values():
            thread.start()
        for name in ("a", "b", "r", "s"):
            if name == "r":
                self.over.set()
            threads[name].join(150)
            assert not threads[name].is_alive(), (name, self.outcomes)
        return self.outcomes


def piece(sender: str, number: int) -> torch.Tensor:
    return torch.full((LENGTH,), 2 * number + (sender == "b"), dtype=torch.int64)


def exchange(links: Links, peer: str, first: int = 0, count: int = PIECES) -> bool:
    """Pieces both ways at once, in their order; whether each arrived as it was sent."""
    right = True
    for number in range(first, first + count):
        links.send_tensor(peer, "piece", piece(links.name, number))
        links.send_object(peer, "small", {"number": number})
    for number in range(first, first + count):
        right &= torch.equal(
            links.receive_tensor(peer, "piece", torch.int64, (LENGTH,)), piece(peer, number)
        ) and links.receive_object(peer, "small") == {"number": number}
    return right


def both(act: Callable[[Links, str], Any]) -> dict[str, Party]:
    return {"a": lambda links: act(links, "b"), "b": lambda links: act(links, "a")}


def not_lost(links: Links, *names: str) -> bool:
    """Whether none of these is lost; it may have ended."""
    return all(links._mailboxes.failure(name) is None for name in names)


def test_two_that_only_dial_out_exchange_what_they_like(tmp_path: Path) -> None:
    outcomes = Meeting(tmp_path).run(**both(exchange))
    assert (outcomes["a"], outcomes["b"]) == (True, True), outcomes


def test_a_relay_that_is_killed_costs_nobody_but_itself(tmp_path: Path) -> None:
    """In the middle of what it passes on: all arrives through the other one. Which of them is used first depends on the moment."""
    meeting = Meeting(tmp_path)
    killed = queue.SimpleQueue[str]()
    one = threading.Lock()

    def killed_on_its_way(relay: NetworkLinks) -> None:
        passed, pass_on = [0], relay._connections._relay.pass_on

        def counting(origin: Any, frame: Frame) -> None:
            if frame.size > 1000:
                passed[0] += 1
            if passed[0] >= 5 and one.acquire(blocking=False):
                kill_links(relay)
                killed.put(relay.name)
                killed.put(relay.name)
            pass_on(origin, frame)

        relay._connections._relay.pass_on = counting  # type: ignore[method-assign]

    def party(links: Links, peer: str) -> bool:
        right, gone = exchange(links, peer), killed.get(timeout=100)
        with pytest.raises(PeerLostError) as caught:
            links.receive_object(gone, "never")
        return right and caught.value.peer == gone and not_lost(links, peer, *({FIRST, OTHER} - {gone}))

    outcomes = meeting.run(killed_on_its_way, ("r", "s"), **both(party))
    assert (outcomes["a"], outcomes["b"]) == (True, True), outcomes


def dropping(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    """It passes on nothing that is large: words about it alone."""
    if frame.size < 200:
        pass_on(origin, frame)


def dropping_all(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    pass


def repeating(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    for _ in range(3):
        pass_on(origin, frame)


def changing(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    changed = frame.payload.clone()  # type: ignore[union-attr]
    changed[random.Random(frame.size).randrange(len(changed))] ^= 1
    pass_on(origin, Frame(frame.kind, frame.tag, frame.sequence, changed, frame.size))


def reordering(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    """Each second one is kept, and comes after the next."""
    kept = relay.__dict__.setdefault("_kept_for_later", {})
    if before := kept.pop(origin.name, None):
        pass_on(origin, frame)
        pass_on(origin, before)
    else:
        kept[origin.name] = frame


def swapping(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    """What one says goes back to itself, as of the other."""
    other = "b" if origin.name == "a" else "a"
    relay._outgoing.pass_on(origin, other, frame.payload)  # type: ignore[arg-type]


def denying(relay: NetworkLinks, pass_on: Any, origin: Any, frame: Frame) -> None:
    """It says that the other is gone, and silent, and passes everything on."""
    other = "b" if origin.name == "a" else "a"
    for how in ("gone", "silent"):
        relay._outgoing.put_at_once(origin, Kind.RELAY_GREETING, {how: other, "start": ""})
    pass_on(origin, frame)


@pytest.mark.parametrize(
    "deviation",
    [dropping, dropping_all, repeating, changing, reordering, swapping, denying],
    ids=lambda each: each.__name__,
)
def test_a_relay_that_deviates_changes_nothing_that_arrives(deviation: Any, tmp_path: Path) -> None:
    """Nobody is lost for it, and what arrives is what was sent. The first that is used deviates: which, depends on the moment."""
    one, deviating = threading.Lock(), list[str]()

    def deviates(relay: NetworkLinks) -> None:
        pass_on = relay._connections._relay.pass_on

        def act(origin: Any, frame: Frame) -> None:
            if one.acquire(blocking=False):
                deviating.append(relay.name)
            if relay.name in deviating:
                deviation(relay, pass_on, origin, frame)
            else:
                pass_on(origin, frame)

        relay._connections._relay.pass_on = act  # type: ignore[method-assign]

    def party(links: Links, peer: str) -> bool:
        right = exchange(links, peer)
        links.require_all()
        return right and not_lost(links, *links.peers)

    outcomes = Meeting(tmp_path).run(deviates, ("r", "s"), **both(party))
    assert (outcomes["a"], outcomes["b"]) == (True, True) and deviating, outcomes


def test_a_relay_cannot_say_anything_in_the_name_of_a_hospital(tmp_path: Path) -> None:
    """It greets as b with its own certificate, repeats what made their link, and seals frames of its own: all of it is refused."""
    meeting = Meeting(tmp_path)
    genuine = dict[str, Any]()  # by hospital, whichever relay passed it on: that depends on the moment

    def records(relay: NetworkLinks) -> None:
        pass_on = relay._connections._relay.pass_greeting_on

        def recording(origin: Any, greeting: Any) -> None:
            genuine[origin.name] = greeting
            pass_on(origin, greeting)

        relay._connections._relay.pass_greeting_on = recording  # type: ignore[method-assign]

    def party(links: Links, peer: str) -> bool:
        right = exchange(links, peer, 0, 2)
        links.send_object(FIRST, "attack", {})
        links.receive_object(FIRST, "attacked")
        return right and exchange(links, peer, 2, 2) and not_lost(links, FIRST)

    def attacks(links: NetworkLinks) -> None:
        for name in ("a", "b"):
            links.receive_object(name, "attack")
        for name, other in (("a", "b"), ("b", "a")):
            mine = links._connections._greeter.greet(name)
            for greeting in ({**mine, "name": other}, genuine[other], {**genuine[other], "signature": "00"}):
                links._outgoing.put(links._outgoing.peers[name], Kind.RELAY_GREETING, "", greeting)
            for sealed in (b"", b"no number", bytes(8) + bytes(40), bytes(7) + b"\x80" + bytes(40)):
                links._outgoing.put(links._outgoing.peers[name], Kind.RELAY, other, sealed)
            links.send_object(name, "attacked", {})

    parties = both(party) | {FIRST: attacks}
    outcomes = meeting.run(records, ("r", "s"), **parties)
    assert (outcomes["a"], outcomes["b"], outcomes[FIRST]) == (True, True, None), outcomes


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a", "b"])
def test_one_that_starts_again_is_linked_again(who: str, tmp_path: Path) -> None:
    """Whichever of the two it is: the one that greets, or the other."""
    meeting = Meeting(tmp_path)
    other = "b" if who == "a" else "a"
    lost = threading.Event()

    def starts_again(links: NetworkLinks) -> bool:
        right = exchange(links, other, 0, 1)
        meeting.await_made()
        kill_links(links)
        assert lost.wait(60)
        with contextlib.suppress(KilledError), meeting.links_of(who) as again:
            eventually(lambda: again.alive(other), 60.0, "they are linked again")
            right = right and exchange(again, other, 1, 2)
        return right

    def stays(links: NetworkLinks) -> bool:
        right = exchange(links, who, 0, 1)
        with pytest.raises(PeerLostError) as caught:
            links.receive_object(who, "never")
        lost.set()
        eventually(lambda: links.alive(who), 60.0, "they are linked again")
        return right and caught.value.peer == who and exchange(links, who, 1, 2)

    outcomes = meeting.run(**{who: starts_again, other: stays})
    assert outcomes[other] is True and outcomes[who] in (True, "killed"), outcomes


def test_what_relays_say_late_of_the_start_before_ends_no_link(tmp_path: Path) -> None:
    """Both say once more that 'a' is gone, as they did, when 'a' has started again and is linked."""
    meeting, lost, linked = Meeting(tmp_path), threading.Event(), threading.Event()
    said: dict[str, list[Callable[[], None]]] = {"r": [], "s": []}

    def noted(relay: NetworkLinks) -> None:
        put = relay._outgoing.put_at_once

        def noting(peer: Any, kind: Kind, payload: dict[str, Any]) -> None:
            if "gone" in payload and peer.name == "b":
                said[relay.name].append(lambda: put(peer, kind, payload))
            put(peer, kind, payload)

        relay._outgoing.put_at_once = noting  # type: ignore[method-assign]

    def repeats(links: NetworkLinks) -> None:
        assert linked.wait(120)
        for word in list(said[links.name]):
            word()
        links.send_object("b", "repeated", {})
        meeting.over.wait(120)

    def starts_again(links: NetworkLinks) -> bool:
        meeting.await_made()
        kill_links(links)
        assert lost.wait(60)
        with contextlib.suppress(KilledError), meeting.links_of("a") as again:
            eventually(lambda: again.alive("b"), 60.0, "they are linked again")
            linked.set()
            return exchange(again, "b", 0, 2)
        return False

    def stays(links: NetworkLinks) -> bool:
        with pytest.raises(PeerLostError):
            links.receive_object("a", "never")
        lost.set()
        eventually(lambda: links.alive("a"), 60.0, "they are linked again")
        for relay in said:
            links.receive_object(relay, "repeated")
        return not_lost(links, "a") and exchange(links, "a", 0, 2)

    outcomes = meeting.run(noted, ("r", "s"), a=starts_again, b=stays, r=repeats, s=repeats)
    assert all(said.values()) and outcomes["b"] is True and outcomes["a"] in (True, "killed"), outcomes


def test_one_that_joins_later_is_reached_through_relays_once_it_has_said_so(tmp_path: Path) -> None:
    """Of 'b' the others know no more than that it joins later; 'a', which can only dial out, too, hears it from somebody."""
    meeting = Meeting(tmp_path)
    addresses = {name: f"127.0.0.1:{port}" for name, port in meeting.ports.items()}

    def links_of(name: str) -> NetworkLinks:
        found = routes(name, NAMES, addresses, ["r", "s"], [] if name == "b" else ["b"])
        said = Options(relay=["r", "s"], tolerated=[other for other in NAMES if other != name], goes_on_without=True)
        later = Tolerance(said.tolerance.peers, True, later=frozenset("ab") - {name})
        reach = Reach(addresses.get(name), found, ("r", "s"))
        return NetworkLinks(load_identity(tmp_path / name, name), said.agreement, reach, said.timeouts, later)

    meeting.links_of = links_of  # type: ignore[method-assign]

    def hears_of_it(links: NetworkLinks) -> bool:
        assert links._outgoing.peers["b"].route == Route("dial")
        links.learn_relays("b", ["nobody", "r", "s"])
        eventually(lambda: links.alive("b"), 60.0, "it is linked")
        return exchange(links, "b", 0, 2)

    def joins(links: NetworkLinks) -> bool:
        eventually(lambda: links.alive("a"), 60.0, "it is linked")
        return exchange(links, "a", 0, 2)

    outcomes = meeting.run(a=hears_of_it, b=joins)
    assert (outcomes["a"], outcomes["b"]) == (True, True), outcomes
