"""Links between real processes and against attackers: who gets in, what is refused, who is named when lost."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

import mpc_fl
from mpc_fl.crypto.authority import Authority, make_local_identities
from mpc_fl.crypto.certificates import Identity, sign
from mpc_fl.crypto.identity_files import load_identity, write_identity
from mpc_fl.errors import HandshakeError, IdentityError, LinkError, PeerLostError, ProtocolError
from mpc_fl.links import connections, handshake
from mpc_fl.links.frames import Kind, encode_frame
from mpc_fl.links.handshake import Agreement, make_greeting
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import routes
from mpc_fl.links.sealing import Sealer, Unsealer
from mpc_fl.links.settings import Reach, Timeouts
from tests.support.dialling import stream_end
from tests.support.harness import SPAWN, free_ports, local_links, run_parties
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes


def exchange(links: Any) -> dict[str, Any]:
    """Every party sends every peer a large and a small tensor and an object."""
    large = torch.arange(1_500_000)
    links.set_phase("exchange")
    for peer in links.peers:
        links.send_tensor(peer, "large", large)
        links.send_object(peer, "object", {"from": links.name})
        links.send_tensor(peer, "small", torch.ones(2, 3))
    for peer in links.peers:
        assert torch.equal(links.receive_tensor(peer, "small", torch.float32, (2, 3)), torch.ones(2, 3))
        assert torch.equal(links.receive_tensor(peer, "large", torch.int64, None), large)
        assert links.receive_object(peer, "object") == {"from": peer}
    seeds = {peer: links.pairwise_seed(peer, "masks").reveal_for_transport() for peer in links.peers}
    other = {peer: links.pairwise_seed(peer, "other").reveal_for_transport() for peer in links.peers}
    traffic = {peer: count.bytes_sent for peer, count in links.traffic["exchange"].items()}
    return {"seeds": seeds, "other": other, "traffic": traffic}


def test_everything_arrives_and_pairwise_seeds_agree(tmp_path: Path) -> None:
    results = run_parties(exchange, ["a", "b", "c"], tmp_path)
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert results[one]["seeds"][other] == results[other]["seeds"][one]
        assert results[one]["seeds"][other] != results[one]["other"][other]
        assert 12_000_000 < results[one]["traffic"][other] < 12_001_000
    assert len({results["a"]["seeds"]["b"], results["a"]["seeds"]["c"], results["b"]["seeds"]["c"]}) == 3


def observed_exchange(links: Any, directory: str) -> dict[str, Any]:
    """`exchange`, and at the relay a look at every frame it passed on."""
    result = exchange(links)

    def relayed() -> int:
        return sum(count.bytes_relayed for counts in list(links.traffic.values()) for count in list(counts.values()))

    if links.name == "relay":  # it may have its own part before the others have theirs
        eventually(lambda: relayed() > 2 * 12_000_000, 60.0, "both have been passed on")
    result["relayed"] = relayed()
    return result


def test_parties_that_only_dial_out_reach_each_other_through_a_relay_that_reads_nothing(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    names = ["a", "b", "c", "relay"]
    results = run_parties(
        observed_exchange, names, tmp_path, str(seen), dial_out_only=["a", "b"], relay="relay",
        observer=RelayObserver(str(seen)),
    )  # fmt: skip
    for one, other in combinations(names, 2):
        assert results[one]["seeds"][other] == results[other]["seeds"][one]
    assert results["relay"]["relayed"] > 2 * 12_000_000 and results["c"]["relayed"] == 0
    # What the relay saw of the 12 MB counter tensors: about as many of each byte value, no run of them.
    relayed = b"".join(path.read_bytes() for path in seen.iterdir())
    assert len(relayed) > 2 * 12_000_000
    counts = np.bincount(np.frombuffer(relayed, dtype=np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-7  # false-alarm rate 1e-7
    assert bytes(torch.arange(100, 110).numpy().tobytes()) not in relayed


def exchange_without_the_relay(links: Any) -> int:
    """The relay has nothing to do itself; the others need it for many messages."""
    if links.name == "relay":
        return 0
    peer = "a" if links.name == "b" else "b"
    for number in range(20):
        links.send_tensor(peer, "number", torch.tensor([number]))
        assert int(links.receive_tensor(peer, "number", torch.int64, (1,))) == number
    return 20


def test_a_relay_that_has_finished_stays_for_the_others(tmp_path: Path) -> None:
    names = ["a", "b", "relay"]
    results = run_parties(exchange_without_the_relay, names, tmp_path, dial_out_only=["a", "b"], relay="relay")
    assert results == {"a": 20, "b": 20, "relay": 0}


class RelayObserver:
    """Keeps the payloads of relayed frames that reach a party which is not their end."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, peer: str, frame: Any) -> None:
        if frame.kind == Kind.RELAY and frame.tag in ("a", "b") and peer in ("a", "b"):
            with open(f"{self.directory}/{peer}", "ab") as file:
                file.write(frame.payload.numpy().tobytes())


def test_sealed_chunks_open_unless_they_are_changed_or_of_another_direction() -> None:
    key = bytes(range(32))
    sealer = Sealer(key, "a", "b")
    chunks = [sealer.seal(b"one"), sealer.seal(b"two")]
    assert [Unsealer(key, "a", "b").unseal(chunks[0])] == [b"one"]
    word = sealer.seal_word(b"one")
    assert len({*chunks, word}) == 3 and Unsealer(key, "a", "b").unseal(word) == b"one"
    renumbered = chunks[1][:8] + chunks[0][8:]
    for bad in (chunks[0][:-1] + bytes([chunks[0][-1] ^ 1]), chunks[0][:5], b"", renumbered):
        with pytest.raises(ProtocolError, match="was changed"):
            Unsealer(key, "a", "b").unseal(bad)
    with pytest.raises(ProtocolError):
        Unsealer(key, "b", "a").unseal(chunks[0])


@pytest.mark.parametrize("count", [2, 4])
def test_both_ends_of_a_route_agree(count: int) -> None:
    """For every set of parties with an address: one end dials, or both use a relay that both dial."""
    names = [f"p{index}" for index in range(count)]
    for mask in range(1, 2**count):
        addresses = {name: f"host:{index + 1}" for index, name in enumerate(names) if mask >> index & 1}
        relay = next(iter(addresses))
        table = {name: routes(name, names, addresses, [relay]) for name in names}
        for one, other in combinations(names, 2):
            ends = {table[one][other].how, table[other][one].how}
            assert ends in ({"dial", "await"}, {"relay, first", "relay, second"})
            if "dial" not in ends:
                assert table[one][relay].how == table[other][relay].how == "dial"
    with pytest.raises(LinkError, match="both only dial out"):
        routes("p0", names, {})


def _together(
    directory: Path, second: dict[str, Any] | None = None, timeout: float = 20.0
) -> list[BaseException | None]:
    """Connect 'a' and 'b' in two threads of this process; return what each raised."""
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    outcome: list[BaseException | None] = [None, None]

    def run(index: int, name: str, options: dict[str, Any]) -> None:
        try:
            with local_links(name, ["a", "b"], ports, directory, connect_timeout=timeout, **options):
                pass
        except (LinkError, IdentityError, ProtocolError) as error:
            outcome[index] = error

    threads = [
        threading.Thread(target=run, args=(0, "a", {})),
        threading.Thread(target=run, args=(1, "b", second or {})),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def test_two_good_parties_connect(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    assert _together(tmp_path) == [None, None]


@pytest.mark.parametrize(
    ("agreement", "word"),
    [
        (Agreement("test", "another", "train"), "configuration"),
        (Agreement("another", "digest", "train"), "session"),
        (Agreement("test", "digest", "infer"), "task"),
    ],
)
def test_parties_that_do_not_agree_part_before_data(agreement: Agreement, word: str, tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    errors = _together(tmp_path, {"agreement": agreement})
    assert all(isinstance(error, (HandshakeError, PeerLostError)) for error in errors), errors
    assert any(isinstance(error, HandshakeError) and word in str(error) for error in errors), errors


def test_a_certificate_of_another_authority_does_not_connect(tmp_path: Path) -> None:
    make_local_identities(["a"], {"a": tmp_path / "a"})
    make_local_identities(["b"], {"b": tmp_path / "b"})
    errors = _together(tmp_path, timeout=3.0)
    assert all(isinstance(error, PeerLostError) for error in errors), errors


def test_an_expired_certificate_is_refused_at_its_owner(tmp_path: Path) -> None:
    identity = Authority(datetime.timedelta(hours=1)).issue("a", datetime.timedelta(minutes=-1))
    write_identity(identity, tmp_path)
    with pytest.raises(IdentityError, match="expired"):
        load_identity(tmp_path, "a")


def test_identity_files_are_checked(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    assert (tmp_path / "a" / "a.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(IdentityError, match="cannot read"):
        load_identity(tmp_path / "a", "b")
    os.chmod(tmp_path / "a" / "a.key", 0o640)
    with pytest.raises(IdentityError, match="other users"):
        load_identity(tmp_path / "a", "a")
    shutil.copy(tmp_path / "b" / "b.key", tmp_path / "a" / "a.key")
    with pytest.raises(IdentityError, match="does not belong"):
        load_identity(tmp_path / "a", "a")
    for suffix in ("key", "crt"):
        shutil.copy(tmp_path / "b" / f"b.{suffix}", tmp_path / "a" / f"a.{suffix}")
    with pytest.raises(IdentityError, match="does not name a"):
        load_identity(tmp_path / "a", "a")
    (tmp_path / "a" / "a.crt").write_text("no certificate")
    with pytest.raises(IdentityError, match="not valid PEM"):
        load_identity(tmp_path / "a", "a")


class Attacker:
    """Dials 'a' with the identity in `directory` and sends raw chunks."""

    def __init__(self, directory: Path, name: str, port: int) -> None:
        self.identity = load_identity(directory, name)
        self.port = port

    def send(self, *chunks: bytes) -> str:
        """Send, wait for the end of the stream, return its status and details."""
        return stream_end("a", self.port, self.identity, chunks, 10)


def _hello(identity: Identity, **changes: Any) -> bytes:
    """A greeting of `identity` to 'a' that is genuine but for `changes`, which are signed too."""
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    greeting = {**make_greeting(identity, Agreement("test", "digest", "train"), "a", key), **changes}
    signed = {name: value for name, value in greeting.items() if name != "signature"}
    message = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
    if "signature" not in changes:
        greeting["signature"] = sign(identity, "mpc-fl greeting", message).hex()
    return next(encode_frame(Kind.HELLO, "", 0, greeting))


def _oversized() -> bytes:
    """The header of a frame that announces more than a frame may hold."""
    head = next(encode_frame(Kind.TENSOR, "x", 1, torch.zeros(1, dtype=torch.int64)))
    size = (1 << 33).to_bytes(8, "little")
    return head[:18] + size + head[26:27] + (1 << 30).to_bytes(8, "little")


Chunks = Callable[[Identity], list[bytes]]


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        (lambda b: [b"GET / HTTP/1.1"], "truncated"),
        (lambda b: [b"x" * 100], "magic"),
        (lambda b: [next(encode_frame(Kind.OBJECT, "", 0, {"name": "b"}))], "not a greeting"),
        (lambda b: [next(encode_frame(Kind.HELLO, "", 0, {"name": "b"}))], "not a greeting"),
        (lambda b: [_hello(b, name="a")], "certificate of b was used as 'a'"),
        (lambda b: [_hello(b, name="c")], "certificate of b was used as 'c'"),
        (lambda b: [_hello(b, to="c")], "made for another link"),
        (lambda b: [_hello(b, signature="00" * 70)], "does not verify"),
        (lambda b: [_hello(b, signature="zz")], "not signed"),
        (lambda b: [_hello(b, version="0.0.0")], "b runs version 0.0.0, protocol 1 and a version .*, protocol 7"),
        (lambda b: [_hello(b, answers="ab" * 32)], "answers another"),
        (lambda b: [_hello(b, public_key="zz")], "no valid public key"),
        (lambda b: [_hello(b), b"garbage"], "truncated"),
        (lambda b: [_hello(b), _oversized()], "do not agree|larger than the limit"),
        (lambda b: [hello := _hello(b), hello], "out of sequence"),
    ],
)
def test_bad_streams_are_refused_with_the_reason(
    chunks: Chunks, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    said: list[str] = []
    links = local_links("a", ["a", "b"], ports, tmp_path, linger_after_error=0.1)  # the attacker needs no reason

    def attack() -> None:
        attacker = Attacker(tmp_path / "b", "b", ports["a"])
        said.append(attacker.send(*chunks(attacker.identity)))
        links.interrupt(LinkError("the attack is over"))  # the genuine 'b' never comes

    thread = threading.Thread(target=attack)
    thread.start()
    with pytest.raises((LinkError, ProtocolError)), links as a:
        a.receive_object("b", "never")
    thread.join()
    assert re.search(reason, said[0]), said
    assert re.search(reason, caplog.text), "the refusal is logged with its reason"


def test_a_plaintext_client_gets_nothing(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    answers: list[bytes] = []

    def attack() -> None:
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", ports["a"]), timeout=5) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            connection.settimeout(3)
            try:
                answers.append(connection.recv(1000))
            except OSError:
                answers.append(b"")

    thread = threading.Thread(target=attack)
    thread.start()
    with pytest.raises(PeerLostError, match="b did not connect"):
        with local_links("a", ["a", "b"], ports, tmp_path, connect_timeout=2.0):
            pass  # pragma: no cover
    thread.join()
    assert b"HTTP" not in answers[0]


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        ports = {"a": busy.getsockname()[1], "b": 1}
        with pytest.raises(LinkError, match="port is in use"):
            local_links("a", ["a", "b"], ports, tmp_path).__enter__()


def test_an_aborting_party_tells_its_reason(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))

    def victim() -> None:
        try:
            with local_links("b", ["a", "b"], ports, tmp_path):
                raise ProtocolError("the update is too large")
        except ProtocolError:
            pass

    thread = threading.Thread(target=victim)
    thread.start()
    with pytest.raises(PeerLostError, match="b stopped: the update is too large") as caught:
        with local_links("a", ["a", "b"], ports, tmp_path) as links:
            links.receive_object("b", "never")
    thread.join()
    assert caught.value.peer == "b"


@pytest.mark.parametrize("error", [None, ProtocolError("the update is too large")])
def test_how_long_an_ending_party_stays_is_a_setting(
    error: ProtocolError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_local_identities(["a"], {"a": tmp_path / "a"})
    stayed: list[float] = []
    monkeypatch.setattr(connections, "wait_for_all", lambda conversations, seconds: stayed.append(seconds))
    identity, agreement = load_identity(tmp_path / "a", "a"), Agreement("test", "digest", "train")
    for timeouts in (Timeouts(1.0, 1.0), Timeouts(1.0, 1.0, linger=0.25, linger_after_error=0.125)):
        links = NetworkLinks(identity, agreement, Reach(None, {}), timeouts)
        links.__enter__().__exit__(type(error), error, None)
    assert stayed == ([10.0, 0.25] if error is None else [10.0, 0.125])


def test_an_unforeseen_error_does_not_cross_the_link(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))

    def victim() -> None:
        try:
            with local_links("b", ["a", "b"], ports, tmp_path):
                raise RuntimeError("value 123456 of the secret")
        except RuntimeError:
            pass

    thread = threading.Thread(target=victim)
    thread.start()
    with pytest.raises(PeerLostError, match="b stopped: RuntimeError") as caught:
        with local_links("a", ["a", "b"], ports, tmp_path) as links:
            links.receive_object("b", "never")
    thread.join()
    assert "123456" not in str(caught.value)


def test_a_late_party_is_named_with_the_phase(tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    release = threading.Event()

    def slow() -> None:
        with local_links("b", ["a", "b"], ports, tmp_path):
            release.wait(30)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        with pytest.raises(PeerLostError, match="b is late: nothing for 'update' within 0.5 s in phase 'summing'"):
            # 'b' does not end before this test lets it: staying for it would be in vain.
            with local_links("a", ["a", "b"], ports, tmp_path, receive_timeout=0.5, linger_after_error=0.1) as links:
                links.set_phase("summing")
                links.receive_tensor("b", "update", torch.int64, (1,))
    finally:
        release.set()
        thread.join()


def test_who_ends_before_it_reads_the_answer_to_its_greeting_is_heard(tmp_path: Path) -> None:
    """'b' has greeted 'a', which goes on already, and fails before it has read the answer: 'a' hears why.

    So it was when a party was killed at once after connecting: the third left without a word, and was blamed.
    """
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    answered, ended = threading.Event(), threading.Event()

    def hold_back(sender: str, frame: Any) -> None:
        if frame.kind == Kind.WELCOME:
            answered.set()
            ended.wait(30)

    links = local_links("b", ["a", "b"], ports, tmp_path, observer=hold_back)

    def fail() -> None:
        assert answered.wait(30)
        links.interrupt(PeerLostError("c", "lost c in phase 'connect'"))

    def leave() -> None:
        try:
            with pytest.raises(PeerLostError, match="lost c"), links:
                pass
        finally:
            ended.set()

    threads = [threading.Thread(target=fail), threading.Thread(target=leave)]
    for thread in threads:
        thread.start()
    with pytest.raises(PeerLostError, match="b stopped: lost c in phase 'connect'"):
        with local_links("a", ["a", "b"], ports, tmp_path) as other:
            other.receive_object("b", "never")
    ended.set()
    for thread in threads:
        thread.join()


def _older(directory: Path, ports: dict[str, int], results: Any) -> None:
    """A party 'b' as it was before protocols had a number: it greets with the version of the program alone."""
    handshake._VERSION = mpc_fl.__version__
    try:
        with local_links("b", ["a", "b"], ports, directory, connect_timeout=30.0):
            results.put("connected")
    except LinkError as error:
        results.put(str(error))


@pytest.mark.parametrize("older_dials", [True, False])
def test_a_party_of_an_older_protocol_is_refused_in_one_line_that_names_both(older_dials: bool, tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip("ab" if older_dials else "ba", free_ports(1), strict=False))
    results = SPAWN.Queue()
    older = SPAWN.Process(target=_older, args=(tmp_path, ports, results))
    older.start()
    version = mpc_fl.__version__
    with pytest.raises(HandshakeError) as caught:
        with local_links("a", ["a", "b"], ports, tmp_path, connect_timeout=30.0):
            pass
    if older_dials:
        assert caught.value.what == f"b runs version {version}, protocol 1 and a version {version}, protocol 7"
        assert f"a refused b: b runs version {version}, protocol 1" in results.get(timeout=60)
    else:  # it refuses first, in its own words
        assert "b refused a: a runs version" in caught.value.what or "not the same version" in caught.value.what
    older.join()
