"""Links between real processes and against attackers: who gets in, what is refused, who is named when lost."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from harness import free_ports, local_links, run_parties

from mpc_fl.errors import HandshakeError, IdentityError, LinkError, PeerLostError, ProtocolError
from mpc_fl.frames import Kind, encode_frame
from mpc_fl.identity import Authority, host_name, load_identity, make_local_identities, write_identity
from mpc_fl.transport import Agreement

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
        identity = load_identity(directory, name)
        credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
        options = [("grpc.ssl_target_name_override", host_name("a"))]
        self.channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)

    def send(self, *chunks: bytes) -> str:
        """Send, wait for the end of the stream, return its status and details."""
        call = self.channel.stream_stream("/mpc_fl.Link/Send")(iter(chunks), wait_for_ready=True, timeout=10)
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"


def _hello(**changes: Any) -> bytes:
    from mpc_fl import __version__

    payload = {"name": "b", "version": __version__, "session": "test", "digest": "digest", "task": "train",
               "public_key": "ab" * 32, **changes}  # fmt: skip
    return next(encode_frame(Kind.HELLO, "", 0, payload))


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([b"GET / HTTP/1.1"], "truncated"),
        ([b"x" * 100], "magic"),
        ([next(encode_frame(Kind.OBJECT, "", 0, {"name": "b"}))], "not a greeting"),
        ([_hello(name="a")], "certificate of b was used as 'a'"),
        ([_hello(name="c")], "certificate of b was used as 'c'"),
        ([_hello(version="0.0.0")], "same version"),
        ([_hello(public_key="zz")], "no valid public key"),
        ([_hello(), b"garbage"], "truncated"),
        ([_hello(), _hello()], "out of sequence"),
    ],
)
def test_bad_streams_are_refused_with_the_reason(chunks: list[bytes], reason: str, tmp_path: Path) -> None:
    make_local_identities(["a", "b"], {name: tmp_path / name for name in "ab"})
    ports = dict(zip(["a", "b"], free_ports(2), strict=True))
    said: list[str] = []

    def attack() -> None:
        said.append(Attacker(tmp_path / "b", "b", ports["a"]).send(*chunks))

    thread = threading.Thread(target=attack)
    thread.start()
    with pytest.raises((LinkError, ProtocolError)), local_links("a", ["a", "b"], ports, tmp_path, connect_timeout=2.0):
        pass  # pragma: no cover - never connects
    thread.join()
    assert reason in said[0], said


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
            with local_links("a", ["a", "b"], ports, tmp_path, receive_timeout=0.5) as links:
                links.set_phase("summing")
                links.receive_tensor("b", "update", torch.int64, (1,))
    finally:
        release.set()
        thread.join()
