"""A hospital with a valid certificate for its rank that binds somebody else's chosen name, or none: nobody takes it for that site.

Real links over mutual TLS, in which the deviating hospital does not look at its own certificate as an honest one does. It is
refused as who dials and as who is dialled, and the true one, which comes to the same links later, is not.
"""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.chosen_names import ChosenNames
from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import write_identity
from mpc_fl.errors import HandshakeError
from mpc_fl.links.frames import Kind, encode_frame
from mpc_fl.links.handshake import Agreement, make_greeting
from tests.support.dialling import stream_end
from tests.support.harness import free_ports, local_links
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
FIRST, SECOND = PARTIES = ["hospital-0", "hospital-1"]
NAMES = ChosenNames.of({FIRST: "charite", SECOND: "st-thomas"})
AGREEMENT = Agreement("test", "digest", "train")
SECONDS = 60.0
REASONS = {
    "charite": "the certificate of hospital-1 binds the name 'charite', and federation.names says 'st-thomas'",
    "st-th0mas": "the certificate of hospital-1 binds the name 'st-th0mas', and federation.names says 'st-thomas'",
    None: "the certificate of hospital-1 binds no chosen name, and federation.names says 'st-thomas'",
}


def _identities(directory: Path) -> Authority:
    """Those of both as they should be, in their directories; the authority, which certifies what the tests ask."""
    authority = Authority(datetime.timedelta(hours=1))
    for party in PARTIES:
        write_identity(authority.issue(party, chosen=NAMES.get(party)), directory / party)
    return authority


def _dial(identity: Identity, port: int) -> str:
    """Dial hospital-0 as a program of one's own would; how the stream ended."""
    greeting = make_greeting(identity, AGREEMENT, FIRST, X25519PrivateKey.generate().public_key().public_bytes_raw())
    return stream_end(FIRST, port, identity, [next(encode_frame(Kind.HELLO, "", 0, greeting))], SECONDS)


def test_who_dials_under_anothers_name_is_refused_and_the_true_one_is_not(tmp_path: Path) -> None:
    authority, ports = _identities(tmp_path), dict(zip(PARTIES, free_ports(2), strict=True))
    heard = list[Any]()

    def wait_for_the_true_one() -> None:
        with local_links(FIRST, PARTIES, ports, tmp_path, chosen=NAMES, connect_timeout=4 * SECONDS) as links:
            heard.append(links.receive_object(SECOND, "who"))

    waiting = threading.Thread(target=wait_for_the_true_one)
    waiting.start()
    said = {chosen: _dial(authority.issue(SECOND, chosen=chosen), ports[FIRST]) for chosen in REASONS}
    with local_links(SECOND, PARTIES, ports, tmp_path, chosen=NAMES) as links:
        links.send_object(FIRST, "who", {"name": "st-thomas"})
    waiting.join(SECONDS)
    assert said == {chosen: f"REFUSED_PARTY: {reason}" for chosen, reason in REASONS.items()}
    assert heard == [{"name": "st-thomas"}]


@pytest.mark.parametrize("chosen", ["st-thomas", None])
def test_who_is_dialled_under_anothers_name_is_refused(chosen: str | None, tmp_path: Path) -> None:
    """Of two that have addresses the later dials: hospital-0 deviates, and TLS alone, which knows identities, would take it."""
    authority, ports = _identities(tmp_path), dict(zip(PARTIES, free_ports(2), strict=True))
    write_identity(authority.issue(FIRST, chosen=chosen), tmp_path / "deviating" / FIRST)
    ended = list[Exception]()

    def deviate() -> None:
        try:
            with local_links(FIRST, PARTIES, ports, tmp_path / "deviating") as links:
                links.receive_object(SECOND, "something")
                ended.append(AssertionError("it was told something"))
        except Exception as error:
            ended.append(error)

    deviating = threading.Thread(target=deviate)
    deviating.start()
    has = "no chosen name" if chosen is None else f"the name '{chosen}'"
    with pytest.raises(
        HandshakeError, match=f"hospital-1 refused hospital-0: .*binds {has}, and federation.names says"
    ):
        with local_links(SECOND, PARTIES, ports, tmp_path, chosen=NAMES) as links:
            links.send_object(FIRST, "something", {})
    eventually(lambda: bool(ended), SECONDS, "the end of hospital-0")
    deviating.join(SECONDS)
    assert len(ended) == 1 and not isinstance(ended[0], AssertionError), ended


def test_a_run_that_names_nobody_takes_certificates_with_names_and_without(tmp_path: Path) -> None:
    authority, ports = _identities(tmp_path), dict(zip(PARTIES, free_ports(2), strict=True))
    write_identity(authority.issue(SECOND), tmp_path / SECOND)
    heard = list[Any]()

    def wait() -> None:
        with local_links(FIRST, PARTIES, ports, tmp_path) as links:
            heard.append(links.receive_object(SECOND, "who"))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with local_links(SECOND, PARTIES, ports, tmp_path) as links:
        links.send_object(FIRST, "who", {})
    waiting.join(SECONDS)
    assert heard == [{}]
