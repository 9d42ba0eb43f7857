"""The party that dials: again and again, until the one at the other end takes its certificate or refuses it."""

from __future__ import annotations

import logging
import ssl
import threading
import time

from mpc_fl.crypto.certificates import Identity, host_name
from mpc_fl.errors import ProtocolError
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.places import Refusals
from mpc_fl.links.streams import Parcel, converse, ended_by, next_parcel, refusal_in
from mpc_fl.links.tls_sockets import TlsSocket, connected_to, context_of, why

log = logging.getLogger(__name__)

_CONNECT, _ANSWER = 10.0, 60.0  # seconds for TCP; for TLS and the first word of who was dialled
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0  # seconds between attempts


class Dialling:
    """Dials `address` until the peer of that name takes the certificate of `identity`, then holds the conversation with it.

    TLS verifies that the certificate there names the peer and is of this federation. It goes on until it is closed.
    """

    def __init__(self, identity: Identity, peer: str, address: str, conversation: Conversation) -> None:
        self._context = context_of(identity, listens=False)
        self._peer, self._address, self._conversation = peer, address, conversation
        self._refusals = Refusals(log)
        self._closed = threading.Event()
        self._line: TlsSocket | None = None
        threading.Thread(target=self._run, name=f"to-{peer}", daemon=True).start()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._conversation.over:
            if self._attempt():
                break
            if self._closed.wait(pause):
                self._conversation.receive(iter(()))
                break
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._refusals.close()

    def _attempt(self) -> bool:
        """Dial once. Whether the other end took the certificate or refused it; what followed is over then."""
        line, deadline = None, time.monotonic() + _ANSWER
        try:
            line = TlsSocket(connected_to(self._address, _CONNECT), self._context, host_name(self._peer))
            self._line = line
            if self._closed.is_set():
                raise ConnectionAbortedError
            line.shake_hands(_ANSWER)
            what, length = next_parcel(line, deadline)
            refusal = None if (what, length) == (Parcel.OPEN, 0) else refusal_in(line, what, length, deadline)
        except (OSError, ProtocolError) as error:
            if line is not None:
                line.close()
            if isinstance(error, ProtocolError | ssl.SSLError):
                reason = error.what if isinstance(error, ProtocolError) else why(error)
                said = f"no link with {self._peer} at {self._address}: {reason}"
                self._refusals.count(said, said)
            return False
        if refusal is None:
            converse(line, self._conversation, self._peer, dialled=True)
        else:
            line.close()
            self._conversation.receive(ended_by(refusal))
        return True

    def close(self) -> None:
        """Dial no more, and end the conversation at once."""
        self._closed.set()
        if self._line is not None:
            self._line.cut()
