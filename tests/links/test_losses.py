"""Which of several losses a party names that waits until all are connected."""

from __future__ import annotations

import threading

import pytest

from mpc_fl.errors import HandshakeError, MpcFlError, PeerLostError
from mpc_fl.links.losses import Known
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.links.traffic import TrafficCounter

LONG = 60.0
REFUSED = HandshakeError("b refused c: the certificate of c was revoked")
TOLD = PeerLostError("b", "b stopped: its data cannot be read")


def mailboxes(grace: float) -> Mailboxes:
    timeouts = Timeouts(LONG, LONG, linger_after_error=grace)
    return Mailboxes({"a": (), "b": ()}, timeouts, Tolerance(), TrafficCounter("connect"))


@pytest.mark.parametrize(("failure", "known"), [(REFUSED, Known.VANISHED), (TOLD, Known.TOLD)], ids=["refused", "told"])
def test_while_links_are_made_what_explains_a_loss_is_named_though_it_comes_later(
    failure: MpcFlError, known: Known
) -> None:
    boxes = mailboxes(LONG)
    boxes.lose("a", boxes.lost("a", "the link ended without a farewell"))
    explains = threading.Timer(0.05, boxes.lose, ("b", failure, known))
    explains.start()
    with pytest.raises(MpcFlError) as caught:
        boxes.await_all_connected()
    explains.join()
    assert caught.value is failure


def test_a_loss_that_nobody_explains_is_named_in_the_end() -> None:
    boxes = mailboxes(0.05)
    boxes.connect("b")
    boxes.lose("a", boxes.lost("a", "the link ended without a farewell"))
    with pytest.raises(PeerLostError, match="lost a in phase 'connect'"):
        boxes.await_all_connected()
