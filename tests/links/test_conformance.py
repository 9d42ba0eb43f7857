"""What protocols may rely on, of every kind of links: the same tests over the network (mutual TLS) and in memory."""

from __future__ import annotations

import abc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import DataError, LinkError, MpcFlError, PeerLostError, ProtocolError, SecrecyError, SumLostError
from mpc_fl.links import mailboxes
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.in_memory import DroppedError, InMemoryNetwork
from mpc_fl.links.links import Links
from tests.support.harness import SPAWN, Options, free_ports, local_links

pytestmark = pytest.mark.processes
NAMES = ["a", "b", "c"]
LONG = 60.0  # seconds that no test is meant to wait

Party = Callable[[Links], Any]


class World(abc.ABC):
    """Parties of one run: each a thread, its links of one kind."""

    def __init__(self, names: list[str], **options: Any) -> None:
        self.names, self.options = names, options

    @abc.abstractmethod
    def links(self, name: str, elsewhere: bool = False, **more: Any) -> Links:
        """Links of a new start of a party; `elsewhere` when an earlier start may still hold its port."""

    @abc.abstractmethod
    def start_doomed(self, name: str) -> Callable[[], None]:
        """Start a party that is killed as soon as somebody sends it the object 'die'; a call waits for its end."""

    def meet(self, **parties: Party) -> dict[str, Any]:
        """Run the parties; what each returned, or the error that it raised."""
        outcomes: dict[str, Any] = {}

        def run(name: str, party: Party) -> None:
            try:
                with self.links(name) as links:
                    result = party(links)
                outcomes[name] = result
            except Exception as error:
                outcomes[name] = error

        threads = [threading.Thread(target=run, args=item) for item in parties.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


def _doomed(name: str, names: list[str], ports: dict[str, int], directory: Path, options: dict[str, Any]) -> None:
    with local_links(name, names, ports, directory, **options) as links:
        while not any(links.waiting(peer, "die") for peer in links.peers):
            links.await_change(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


class NetworkWorld(World):
    directory: Path

    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__(names, **options)
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def links(self, name: str, elsewhere: bool = False, **more: Any) -> Links:
        ports = {**self.ports, name: free_ports(1)[0]} if elsewhere else self.ports
        return local_links(name, self.names, ports, self.directory, **{**self.options, **more})

    def start_doomed(self, name: str) -> Callable[[], None]:
        arguments = (name, self.names, self.ports, self.directory, self.options)
        process = SPAWN.Process(target=_doomed, args=arguments, daemon=True)
        process.start()
        return process.join


class InMemoryWorld(World):
    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__(names, **options)
        said = Options(**options)
        self.network = InMemoryNetwork(names, said.agreement, said.timeouts)

    def links(self, name: str, elsewhere: bool = False, **more: Any) -> Links:
        said = Options(**{**self.options, **more})
        return self.network.links(name, said.tolerance, said.observer)

    def start_doomed(self, name: str) -> Callable[[], None]:
        def run() -> None:
            try:
                with self.links(name) as links:
                    while not any(links.waiting(peer, "die") for peer in links.peers):
                        links.await_change(0.1)
                    self.network.drop(name)
                    links.require_all()
            except DroppedError:
                pass

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread.join


KINDS: dict[str, type[World]] = {"network": NetworkWorld, "in memory": InMemoryWorld}


@pytest.fixture(scope="module", autouse=True)
def _identities(tmp_path_factory: pytest.TempPathFactory) -> None:
    NetworkWorld.directory = tmp_path_factory.mktemp("identities")
    make_local_identities(NAMES, {name: NetworkWorld.directory / name for name in NAMES})


@pytest.fixture(params=list(KINDS))
def world(request: pytest.FixtureRequest) -> type[World]:
    return KINDS[request.param]


def say(receiver: str, tag: str, **value: Any) -> Party:
    return lambda links: links.send_object(receiver, tag, value)


def error_of(call: Callable[..., Any], *arguments: Any) -> MpcFlError:
    with pytest.raises(MpcFlError) as caught:
        call(*arguments)
    return caught.value


# ---- messages --------------------------------------------------------------------------------------------------------


def test_messages_of_a_tag_keep_their_order_and_tags_do_not_wait_for_each_other(world: type[World]) -> None:
    large = torch.arange(600_000)  # of several chunks

    def send(links: Links) -> None:
        for number in range(5):
            links.send_tensor("b", "numbers", torch.tensor([number]))
        links.send_tensor("b", "large", large)
        links.send_object("b", "words", {"last": True})

    def receive(links: Links) -> list[int]:
        assert links.receive_object("a", "words") == {"last": True}
        assert torch.equal(links.receive_tensor("a", "large", torch.int64, (600_000,)), large)
        return [int(links.receive_tensor("a", "numbers", torch.int64, (1,))) for _ in range(5)]

    assert world(["a", "b"]).meet(a=send, b=receive) == {"a": None, "b": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_tensors_arrive_as_sent_and_are_the_receivers_own(world: type[World], dtype: torch.dtype) -> None:
    sent = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)

    def send(links: Links) -> bool:
        links.send_tensor("b", "tensor", sent)
        links.send_tensor("b", "nothing", torch.empty((0, 3), dtype=dtype))
        links.receive_object("b", "changed")
        return bool(sent[0, 0] == 0)

    def receive(links: Links) -> bool:
        got = links.receive_tensor("a", "tensor", dtype, (2, 3))
        links.receive_tensor("a", "nothing", dtype, (0, 3))
        equal = torch.equal(got, sent)
        got[0, 0] = 1
        links.send_object("a", "changed", {})
        return equal

    assert world(["a", "b"]).meet(a=send, b=receive) == {"a": True, "b": True}


def test_another_dtype_shape_or_kind_is_refused(world: type[World]) -> None:
    def send(links: Links) -> None:
        for tag in ("dtype", "shape", "object"):
            links.send_tensor("b", tag, torch.zeros(2, 3))
        links.send_object("b", "tensor", {})

    def receive(links: Links) -> list[str]:
        errors = [
            error_of(links.receive_tensor, "a", "dtype", torch.int64, (2, 3)),
            error_of(links.receive_tensor, "a", "shape", torch.float32, (3, 2)),
            error_of(links.receive_tensor, "a", "tensor", torch.float32, (2, 3)),
            error_of(links.receive_object, "a", "object"),
        ]
        assert all(isinstance(error, ProtocolError) for error in errors)
        return [error.what for error in errors]

    assert world(["a", "b"]).meet(a=send, b=receive)["b"] == [
        "a sent no torch.int64 tensor for 'dtype'",
        "a sent shape (2, 3) for 'shape' instead of (3, 2)",
        "a sent no torch.float32 tensor for 'tensor'",
        "a sent a tensor for 'object'",
    ]


def test_what_cannot_be_sent_is_refused_before_it_leaves(world: type[World]) -> None:
    def send(links: Links) -> list[str]:
        errors = [error_of(links.send_tensor, "b", "complex", torch.zeros(1, dtype=torch.complex64))]
        errors.append(error_of(links.send_object, "b", "t" * 300, {}))
        errors.append(error_of(links.send_object, "b", "long", {"x": "y" * (1 << 20)}))
        links.send_object("b", "after", {})
        return [error.what for error in errors]

    outcome = world(["a", "b"]).meet(a=send, b=lambda links: links.receive_object("a", "after"))
    assert outcome["b"] == {}
    assert [what.split(":")[0] for what in outcome["a"]] == [
        "tensors of torch.complex64 cannot be sent",
        "a frame tag is too long",
        "a control message is too long",
    ]


# ---- deadlines -------------------------------------------------------------------------------------------------------


def test_a_wait_ends_at_its_deadline_and_names_party_tag_and_phase(world: type[World]) -> None:
    def wait(links: Links) -> list[Any]:
        links.set_phase("summing")
        late = error_of(links.receive_object, "b", "never")
        past = error_of(links.receive_tensor, "b", "never", torch.int64, None, time.monotonic() - 1.0)
        nobody = links.await_any({"b": "never"}, time.monotonic() + 0.05)
        links.send_object("b", "enough", {})
        return [late, past, nobody, links.alive("b")]

    def silent(links: Links) -> None:
        links.receive_object("a", "enough", time.monotonic() + LONG)

    late, past, nobody, alive = world(["a", "b"], receive_timeout=0.2).meet(a=wait, b=silent)["a"]
    assert isinstance(late, PeerLostError) and late.peer == "b"
    assert late.what == "b is late: nothing for 'never' within 0.2 s in phase 'summing'"
    assert past.what == "b is late: nothing for 'never' within 0 s in phase 'summing'"
    assert nobody is None and alive, "a late party is not lost"


def test_a_party_that_does_not_come_is_named(world: type[World]) -> None:
    outcome = world(["a", "b"], connect_timeout=0.3).meet(a=lambda links: None)["a"]
    assert isinstance(outcome, PeerLostError) and outcome.what == "b did not connect within 0.3 s"


def test_nothing_is_sent_or_derived_before_connecting(world: type[World]) -> None:
    links = world(["a", "b"]).links("a")
    assert isinstance(error_of(links.send_object, "b", "early", {}), LinkError)
    assert isinstance(error_of(links.pairwise_seed, "b", "masks"), LinkError)
    assert not links.alive("b") and links.key_fingerprint("b") == "" and len(links.key_fingerprint("a")) == 64


# ---- scopes and seeds ------------------------------------------------------------------------------------------------


def test_scopes_keep_messages_and_seeds_apart(world: type[World]) -> None:
    def party(links: Links) -> list[bytes]:
        peer = links.peers[0]
        one, other = links.scoped("one"), links.scoped("other")
        nested = one.scoped("inner")
        for number, scope in enumerate((links, one, other, nested)):
            scope.send_object(peer, "tag", {"number": number})
        got = [scope.receive_object(peer, "tag")["number"] for scope in (nested, other, one, links)]
        assert got == [3, 2, 1, 0]
        assert not one.waiting(peer, "tag")
        return [scope.pairwise_seed(peer, "masks").reveal_for_transport() for scope in (links, one, other, nested)]

    outcome = world(["a", "b"]).meet(a=party, b=party)
    assert outcome["a"] == outcome["b"] and len(set(outcome["a"])) == 4


def test_a_seed_is_given_once_and_is_another_with_another_party_or_run(world: type[World]) -> None:
    def party(links: Links) -> dict[str, bytes]:
        seeds = {peer: links.pairwise_seed(peer, "masks").reveal_for_transport() for peer in links.peers}
        for peer in links.peers:
            assert isinstance(error_of(links.pairwise_seed, peer, "masks"), SecrecyError)
        links.scoped("apart").pairwise_seed(links.peers[0], "masks")
        assert isinstance(error_of(links.scoped("apart").pairwise_seed, links.peers[0], "masks"), SecrecyError)
        seeds["fingerprints"] = "".join(sorted(map(links.key_fingerprint, NAMES))).encode()
        return seeds

    runs = [world(NAMES).meet(a=party, b=party, c=party) for _ in range(2)]
    for run in runs:
        assert run["a"]["b"] == run["b"]["a"] and run["a"]["c"] == run["c"]["a"] and run["b"]["c"] == run["c"]["b"]
        assert run["a"]["fingerprints"] == run["b"]["fingerprints"] == run["c"]["fingerprints"]
    assert len({run[one][other] for run in runs for one, other in (("a", "b"), ("a", "c"), ("b", "c"))}) == 6


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_killed_party_ends_every_wait(world: type[World]) -> None:
    def waits_for_b(links: Links) -> None:
        links.set_phase("work")
        links.send_object("c", "die", {})
        links.receive_object("b", "never")

    def waits_for_a(links: Links) -> None:
        links.set_phase("work")
        links.receive_object("a", "never")

    here = world(NAMES)
    ended = here.start_doomed("c")
    outcome = here.meet(a=waits_for_b, b=waits_for_a)
    ended()
    assert all(isinstance(error, PeerLostError) and error.cause == "c" for error in outcome.values()), outcome
    direct = "lost c in phase 'work' (the link ended without a farewell)"
    said = {error.what for error in outcome.values()}  # who ends first tells the other
    assert direct in said and said <= {direct, f"a stopped: {direct}", f"b stopped: {direct}"}


def test_the_loss_of_a_tolerated_party_ends_only_waits_for_it(world: type[World]) -> None:
    def loses(links: Links) -> list[Any]:
        links.set_phase("work")
        links.send_object("c", "die", {})
        lost = error_of(links.receive_object, "c", "never")
        links.require_all()
        first = links.await_any({"c": "never", "b": "never"}, time.monotonic() + LONG)
        sending = error_of(links.send_object, "c", "late", {})
        links.send_object("b", "go on", {})
        return [lost, sending, first, links.receive_object("b", "done"), links.alive("c")]

    def goes_on(links: Links) -> None:
        links.receive_object("a", "go on")
        links.send_object("a", "done", {"by": "b"})

    here = world(NAMES, tolerated=("c",))
    ended = here.start_doomed("c")
    outcome = here.meet(a=loses, b=goes_on)
    ended()
    lost, sending, *others = outcome["a"]
    assert others == ["c", {"by": "b"}, False]
    assert outcome["b"] is None
    for error in (lost, sending):
        assert isinstance(error, PeerLostError) and error.what.startswith("lost c in phase 'work' (the link ended")


@pytest.mark.parametrize("victim", ["a", "b"])  # the one that is dialled, and the one that dials
def test_a_tolerated_party_comes_back_with_new_keys(world: type[World], victim: str) -> None:
    here = world(["a", "b"], tolerated=("a", "b"))
    stays = "b" if victim == "a" else "a"
    ended = here.start_doomed(victim)
    lost = threading.Event()

    def stay(links: Links) -> list[Any]:
        before = [links.key_fingerprint(victim), links.pairwise_seed(victim, "masks").reveal_for_transport()]
        links.send_object(victim, "die", {})
        error_of(links.receive_object, victim, "never")
        lost.set()
        deadline = time.monotonic() + LONG
        while not links.alive(victim) and time.monotonic() < deadline:
            links.await_change(1.0)
        after = [links.key_fingerprint(victim), links.pairwise_seed(victim, "masks").reveal_for_transport()]
        links.send_tensor(victim, "news", torch.ones(1))
        return [before, after, links.receive_object(victim, "again")]

    def come_back() -> list[Any]:
        ended()
        lost.wait(LONG)
        with here.links(victim, goes_on_without=True) as links:
            links.send_object(stays, "again", {})
            links.receive_tensor(stays, "news", torch.float32, (1,))
            return [links.key_fingerprint(victim), links.pairwise_seed(stays, "masks").reveal_for_transport()]

    returned: list[Any] = []
    thread = threading.Thread(target=lambda: returned.extend(come_back()))
    thread.start()
    before, after, again = here.meet(**{stays: stay})[stays]
    thread.join()
    assert again == {} and after == returned and before[0] != after[0] and before[1] != after[1]


class WaitNoticed:
    """The clock of the mailboxes; it notices that a thread waits: the second look at it is under their lock."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.waiting, self._looks = threading.Event(), 0

    def monotonic(self) -> float:
        if threading.current_thread() is self.thread:
            self._looks += 1
            if self._looks == 2:
                self.waiting.set()
        return time.monotonic()


def test_a_wait_for_a_party_that_started_again_ends_and_its_old_messages_are_gone(
    world: type[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world(["a", "b"], tolerated=("b",))
    clock = WaitNoticed()
    monkeypatch.setattr(mailboxes, "time", clock)
    again = threading.Event()

    def stay(links: Links) -> list[Any]:
        assert links.await_any({"b": "old"}, time.monotonic() + LONG) == "b"
        clock.thread = threading.current_thread()
        lost = error_of(links.receive_object, "b", "never")
        deadline = time.monotonic() + LONG
        while not links.alive("b") and time.monotonic() < deadline:
            links.await_change(1.0)
        old = links.waiting("b", "old")
        again.set()
        links.receive_object("b", "new")
        return [lost, old]

    def come_twice() -> None:
        first = here.links("b", linger_after_error=0.1).__enter__()  # not left yet: as if the site's machine hung
        first.send_object("a", "old", {})
        clock.waiting.wait(LONG)
        with here.links("b", elsewhere=True, goes_on_without=True) as links:
            again.wait(LONG)
            first.__exit__(None, LinkError("it was replaced"), None)
            links.send_object("a", "new", {})

    thread = threading.Thread(target=come_twice)
    thread.start()
    lost, old = here.meet(a=stay)["a"]
    thread.join()
    assert isinstance(lost, PeerLostError) and lost.what == "lost b in phase 'connect' (it started again)"
    assert not old


def test_a_party_that_was_connected_is_not_let_in_a_second_time(world: type[World]) -> None:
    here = world(["a", "b"])
    refused: list[MpcFlError] = []

    def twice(links: Links) -> None:
        refused.append(error_of(here.links("b", elsewhere=True).__enter__))
        links.send_object("a", "still here", {})

    outcome = here.meet(a=lambda links: links.receive_object("b", "still here"), b=twice)
    assert outcome == {"a": {}, "b": None}
    assert [error.what for error in refused] == ["a refused b: b is connected already"]


def test_a_farewell_is_no_loss_until_somebody_waits(world: type[World]) -> None:
    def ends(links: Links) -> None:
        links.send_object("a", "before the end", {})

    def stays(links: Links) -> list[Any]:
        links.set_phase("work")
        assert links.receive_object("b", "before the end") == {}
        error = error_of(links.receive_object, "b", "after")
        links.require_all()
        links.send_object("b", "too late", {})  # it goes nowhere, and that is no error
        return [error.what, links.alive("b"), links.await_any({"b": "after"}, time.monotonic() + LONG)]

    outcome = world(["a", "b"]).meet(a=stays, b=ends)
    assert outcome["a"] == ["lost b in phase 'work' (it had finished already)", False, "b"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ProtocolError("the update is too large", "do not repeat this"), "the update is too large"),
        (DataError("42 files of the patient are missing"), "its data cannot be used"),
        (RuntimeError("value 123456 of the secret"), "RuntimeError"),
    ],
)
def test_a_party_that_fails_tells_what_peers_may_know(world: type[World], error: Exception, told: str) -> None:
    def fails(links: Links) -> None:
        raise error

    outcome = world(["a", "b"]).meet(a=lambda links: links.receive_object("b", "never"), b=fails)
    assert outcome["b"] is error
    assert isinstance(outcome["a"], PeerLostError) and outcome["a"].peer == "b"
    assert outcome["a"].what == f"b stopped: {told}" and outcome["a"].fix == "see the log of b"


def test_a_party_that_ends_for_the_loss_of_another_names_that_one(world: type[World]) -> None:
    def blames(links: Links) -> None:
        raise PeerLostError("c", "c is late", "see the log of c")

    def waits(links: Links) -> None:
        links.receive_object("b", "never")

    outcome = world(["a", "b"]).meet(a=waits, b=blames)
    assert (outcome["a"].peer, outcome["a"].cause) == ("b", "c") and outcome["a"].fix == "see the log of c"


def test_an_interruption_ends_this_partys_waits(world: type[World]) -> None:
    reason = ProtocolError("the site is being shut down")

    def interrupted(links: Links) -> list[Any]:
        thread = threading.Thread(target=links.interrupt, args=(reason,))
        thread.start()
        first = error_of(links.receive_object, "b", "never")
        thread.join()
        later = [
            error_of(links.await_any, {"b": "never"}, time.monotonic() + LONG),
            error_of(links.require_all),
        ]
        raise_none = links.waiting("b", "never")
        links.send_object("b", "enough", {})
        return [first, *later, raise_none]

    outcome = world(["a", "b"]).meet(a=interrupted, b=lambda links: links.receive_object("a", "enough"))
    assert outcome == {"a": [reason, reason, reason, False], "b": {}}


def test_who_has_given_up_is_waited_for_no_more(world: type[World]) -> None:
    """In whatever scope the wait is; what came before is taken still, and other waits go on."""

    def waits(links: Links) -> list[Any]:
        bound = links.voided_by("given up 3/1").scoped("sum")
        said = bound.receive_object("b", "said", time.monotonic() + LONG)
        first = error_of(bound.receive_tensor, "b", "slice", torch.int32, (1,), time.monotonic() + LONG)
        spoke = bound.await_any({"b": "never"}, time.monotonic() + LONG)
        second = error_of(bound.scoped("check").receive_object, "b", "never", time.monotonic() + LONG)
        links.send_object("b", "go on", {})
        other = links.voided_by("given up 3/2").receive_object("b", "other", time.monotonic() + LONG)
        return [said, first, spoke, second, other]

    def gives_up(links: Links) -> None:
        links.scoped("sum").send_object("a", "said", {"before": True})
        links.scoped("given up 3").send_object("a", "1", {"reason": "lost c\x1b[2J"})
        links.receive_object("a", "go on")
        links.send_object("a", "other", {"of": "the next view"})

    before, first, spoke, second, other = world(["a", "b"]).meet(a=waits, b=gives_up)["a"]
    assert (before, spoke, other) == ({"before": True}, "b", {"of": "the next view"})
    for error in (first, second):
        assert isinstance(error, SumLostError) and error.what == "b gave up: lost c?[2J"


def test_await_any_says_who_is_first(world: type[World]) -> None:
    def waits(links: Links) -> list[Any]:
        links.send_object("c", "speak", {})
        first = links.await_any({"b": "word", "c": "word"}, time.monotonic() + LONG)
        links.receive_object("c", "word")
        links.send_object("b", "speak", {})
        second = links.await_any({"b": "word", "c": "word of another tag"}, time.monotonic() + LONG)
        waiting = links.waiting("b", "word"), links.waiting("c", "word")
        for peer in links.peers:
            links.send_object(peer, "enough", {})
        return [first, second, waiting]

    def speaks(links: Links) -> None:
        links.receive_object("a", "speak")
        links.send_object("a", "word", {})
        links.receive_object("a", "enough")

    outcome = world(NAMES).meet(a=waits, b=speaks, c=speaks)
    assert outcome == {"a": ["c", "b", (True, False)], "b": None, "c": None}


# ---- what is counted and seen ----------------------------------------------------------------------------------------


def test_both_kinds_count_and_show_the_same() -> None:
    def party(links: Links) -> dict[str, Any]:
        links.set_phase("exchange")
        for peer in links.peers:
            links.send_tensor(peer, "large", torch.zeros(400_000, dtype=torch.int64))
            links.send_object(peer, "words", {"from": links.name})
            links.scoped("inner").send_tensor(peer, "small", torch.ones(3, dtype=torch.bool))
        for peer in links.peers:
            links.receive_tensor(peer, "large", torch.int64, None)
            links.receive_object(peer, "words")
            links.scoped("inner").receive_tensor(peer, "small", torch.bool, (3,))
        counts = {peer: asdict(count) for peer, count in links.traffic["exchange"].items()}
        for count in counts.values():
            assert count.pop("seconds_waited") >= 0.0 and count.pop("waits") <= 3
        assert links.traffic["connect"][links.peers[0]].messages_sent == 1, "a greeting"
        links.set_phase("after")
        assert links.seconds_of("exchange") > 0.0 and links.seconds_of("never") == 0.0
        return counts

    seen: dict[str, list[tuple[str, str, str, int]]] = {}
    counted = {}
    for kind, world in KINDS.items():
        frames: list[tuple[str, str, str, int]] = []

        def observe(sender: str, frame: Frame, frames: list[Any] = frames) -> None:
            if frame.kind in (Kind.TENSOR, Kind.OBJECT, Kind.BYE):
                assert frame.sequence > 0, "the greeting is number 0"
                frames.append((sender, frame.kind.name, frame.tag, frame.size))

        counted[kind] = world(NAMES, observer=observe).meet(a=party, b=party, c=party)
        seen[kind] = sorted(frame for frame in frames if frame[1] != "BYE")
    assert counted["network"] == counted["in memory"]
    assert counted["network"]["a"]["b"] == {
        "bytes_sent": 3_200_131, "bytes_received": 3_200_016, "messages_sent": 3, "messages_received": 3,
        "bytes_relayed": 0,
    }  # fmt: skip
    assert seen["network"] == seen["in memory"] and len(seen["network"]) == 18
