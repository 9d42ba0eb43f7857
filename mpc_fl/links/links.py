"""Links between parties: typed frames over gRPC streams, a deadline on every wait.

One stream per pair of parties. Who has an address is dialled; of two that have one the later in the list dials; two
parties that can only dial out reach each other through the relay, a party both can dial, with everything sealed end to
end. A link begins with one signed greeting from each side (`handshake`). A party that ends well says BYE; one that
fails says ABORT with its reason; a link that ends without either is a lost party. Losing a party ends every wait, except
that the loss of a `tolerated` one, once all have been connected, ends only waits for that one; when it comes back (after
a restart, with new keys) its link is made again. This module moves bytes and does no arithmetic.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import (
    SAME_VERSION,
    DisagreementError,
    HandshakeError,
    LinkError,
    MpcFlError,
    PeerLostError,
    ProtocolError,
    SecrecyError,
)
from mpc_fl.links.frames import Frame, FrameReader, Kind, encode_frame
from mpc_fl.links.grpc_streams import Conversation, StreamServer, dial, wait_for_all
from mpc_fl.links.handshake import Agreement, check_greeting, greeting_digest, make_greeting, pairwise_key
from mpc_fl.links.peer import Peer
from mpc_fl.links.routes import Route
from mpc_fl.links.sealing import Sealer, Unsealer
from mpc_fl.links.traffic import Traffic, TrafficCounter

__all__ = ["Agreement", "Links", "Observer"]

log = logging.getLogger(__name__)

_LONGEST_GREETING = 30.0
_LINGER, _LINGER_AFTER_ERROR = 10.0, 2.0
_REDIAL = 1.0

Observer = Callable[[str, Frame], None]


def first_greeting(reader: FrameReader, names: set[str], chunk: bytes) -> dict[str, Any]:
    """The greeting in a stream's first chunk, from the holder of a certificate of `names`; not checked any further.

    Raises `HandshakeError`, or `ProtocolError` for bytes that are no frame.
    """
    frame = reader.feed(chunk)
    if frame is None or frame.kind != Kind.HELLO or not isinstance(frame.payload, dict):
        raise HandshakeError("the first frame is not a greeting")
    name = frame.payload.get("name")
    if not isinstance(name, str) or name not in names:
        raise HandshakeError(f"the certificate of {', '.join(sorted(names)) or 'nobody'} was used as {name!r}")
    return frame.payload


class Links:
    """This party's links to its peers. Use as a context manager; leaving it with an error tells the peers why.

    `listen` is the address this party serves, None when it can only dial out. `relay` names the party that passes sealed
    chunks between parties that can only dial out. Connecting fails when any party is missing after `connect_timeout`;
    with `resuming` the `tolerated` ones may be missing then.
    """

    def __init__(
        self,
        identity: Identity,
        listen: str | None,
        peers: dict[str, Route],
        agreement: Agreement,
        connect_timeout: float,
        receive_timeout: float,
        observer: Observer | None = None,
        relay: str | None = None,
        tolerated: Collection[str] = (),
        resuming: bool = False,
    ) -> None:
        self.name = identity.name
        self._identity = identity
        self._listen = listen
        self._agreement = agreement
        self._connect_timeout = connect_timeout
        self._receive_timeout = receive_timeout
        self._observer = observer
        self._relay = relay
        self._tolerated, self._resuming, self._started = frozenset(tolerated), resuming, False
        self._peers = {name: Peer(name, route) for name, route in peers.items()}
        self._key = X25519PrivateKey.generate()
        self._changed = threading.Condition()
        self._closing = False
        self._interruption: MpcFlError | None = None
        self._scope = ""
        self._seeds_given: set[tuple[str, bytes, str]] = set()
        self._counter = TrafficCounter("connect")
        self._server: StreamServer | None = None
        self._channels: list[Any] = []

    # ---- connecting ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Links:
        try:
            if self._listen is not None:
                streams, timeout = 2 * len(self._peers) + 4, min(self._connect_timeout, _LONGEST_GREETING)
                self._server = StreamServer(self._identity, self._listen, self.admit, streams, timeout)
            for peer in self._peers.values():
                if peer.route.how == "dial":
                    self._dial(peer)
            self._await_all_peers()
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._stop(error)

    def _public_key(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def _greet(self, peer: Peer, answers: str = "") -> dict[str, Any]:
        return make_greeting(self._identity, self._agreement, peer.name, self._public_key(), answers)

    def _dial(self, peer: Peer) -> None:
        peer.greeting = self._greet(peer)
        conversation = self._converse(peer)
        self._put(peer, Kind.HELLO, "", peer.greeting)
        self._channels.append(dial(self._identity, peer.name, peer.route.address, conversation))

    def _converse(self, peer: Peer) -> Conversation:
        """A new conversation with a peer. One that it replaces has no more say."""

        def take(chunk: bytes) -> bool:
            if peer.conversation is not conversation:
                return False
            frame = peer.reader.feed(chunk)
            return frame is None or self._deliver(peer, frame)

        def ended(failure: MpcFlError | None) -> None:
            if peer.conversation is not conversation:
                return
            if isinstance(failure, HandshakeError):
                failure = HandshakeError(f"{peer.name} refused {self.name}: {failure.what}", "compare the two sides")
            elif isinstance(failure, ProtocolError):
                failure = ProtocolError(f"the link with {peer.name}: {failure.what}", failure.fix)
            self._lose(peer, failure or self._lost(peer, "the link ended without a farewell"))
            self._dial_again(peer)

        conversation = peer.conversation = Conversation(take, ended)
        return conversation

    def _dial_again(self, peer: Peer) -> None:
        """A tolerated peer that this party dials may come back; the dialling goes on until it does or the run ends."""

        def again() -> None:
            with self._changed:
                if self._closing or peer.closed:
                    return
            peer.begin_again(self._lost(peer, "it started again"))
            self._dial(peer)

        if self._started and peer.name in self._tolerated and peer.route.how == "dial" and not self._closing:
            timer = threading.Timer(_REDIAL, again)
            timer.daemon = True
            timer.start()

    def admit(self, names: set[str], chunk: bytes) -> Conversation:
        """Answer the first chunk of a stream that somebody dialled, with a certificate of `names`.

        Called by this party's own server, or by one that many sessions share (`service_front`). Raises `HandshakeError` or
        `ProtocolError`.
        """
        reader = FrameReader()
        greeting = first_greeting(reader, names, chunk)
        name = greeting["name"]
        peer = self._peers.get(name)
        if peer is None:
            raise HandshakeError(f"{name} takes no part in this run")
        if peer.route.how != "await":
            raise HandshakeError(f"{name} should wait to be dialled by {self.name}, or use the relay")
        public_key = self._check(peer, greeting)
        with self._changed:
            if peer.conversation is not None:
                if not self._may_return(peer):
                    raise HandshakeError(f"{peer.name} is connected already")
                # It comes back: the other end of the link before is gone, whether this side has noticed or not.
                peer.begin_again(self._lost(peer, "it started again"))
            conversation = self._converse(peer)
            peer.reader = reader
        self._put(peer, Kind.WELCOME, "", self._greet(peer, greeting_digest(greeting)))
        self._connected(peer, public_key)
        return conversation

    def _may_return(self, peer: Peer) -> bool:
        """Whether a peer that was connected, or is lost, may make its link anew."""
        return self._started and peer.name in self._tolerated and not peer.closed

    def _check(self, peer: Peer, greeting: Any, answers: str = "") -> bytes:
        """The peer's public key. A genuine peer that runs something else ends this party too, a false one does not."""
        try:
            return check_greeting(greeting, peer.name, self._identity, self._agreement, answers)
        except DisagreementError as error:
            self._lose(peer, error)
            raise

    def _connected(self, peer: Peer, public_key: bytes) -> None:
        with self._changed:
            peer.public_key, peer.connected, peer.failure = public_key, True, None
            waiting, peer.waiting_greetings = peer.waiting_greetings, []
            self._changed.notify_all()
        for greeting in waiting:
            self._put(peer, Kind.RELAY_GREETING, "", greeting)
        if peer.name == self._relay:
            for other in self._peers.values():
                if other.route.how == "relay, first":
                    self._greet_through(peer, other)
        if self._relay == self.name and self._started:
            # Those who greet it through this relay do not see that it came back.
            for other in self._peers.values():
                if other is not peer and other.connected and other.failure is None:
                    self._put(other, Kind.RELAY_GREETING, "", {"returned": peer.name})

    def _greet_through(self, relay: Peer, other: Peer) -> None:
        other.greeting = self._greet(other)
        self._put(relay, Kind.RELAY_GREETING, "", other.greeting)

    def _await_all_peers(self) -> None:
        deadline = time.monotonic() + self._connect_timeout
        with self._changed:
            while True:
                self._raise_first_failure()
                missing = [peer.name for peer in self._peers.values() if not peer.connected]
                remaining = deadline - time.monotonic()
                if not missing or (remaining <= 0 and self._resuming and self._tolerated.issuperset(missing)):
                    self._started = True
                    return
                if remaining <= 0:
                    raise PeerLostError(
                        missing[0],
                        f"{', '.join(missing)} did not connect within {self._connect_timeout:g} s",
                        "check that it runs and that its address is right",
                    )
                self._changed.wait(remaining)

    # ---- relaying --------------------------------------------------------------------------------------------------

    def _take_relay_greeting(self, origin: Peer, greeting: Any) -> None:
        """At the relay: pass a greeting on. At its receiver: check it, answer it if it came first."""
        if origin.name == self._relay and set(greeting) == {"returned"}:
            returned = self._peers.get(str(greeting["returned"]))
            if returned is not None and returned.name in self._tolerated and returned.route.how == "relay, first":
                returned.begin_again(self._lost(returned, "it started again"))
                self._greet_through(origin, returned)
            return
        receiver = str(greeting.get("to"))
        if receiver != self.name:
            self._require_relayable(origin, greeting.get("name"), receiver)
            target = self._peers[receiver]
            with self._changed:
                if not target.connected:
                    if len(target.waiting_greetings) >= len(self._peers):
                        raise ProtocolError(f"{origin.name} sent too many greetings", "restart the run")
                    target.waiting_greetings.append(greeting)
                    return
            self._put(target, Kind.RELAY_GREETING, "", greeting)
            return
        sender = self._peers.get(str(greeting.get("name")))
        if sender is not None and self._may_return(sender) and sender.route.how == "relay, second":
            sender.begin_again(self._lost(sender, "it started again"))
        if sender is None or not sender.relayed or origin.name != self._relay or sender.connected:
            raise ProtocolError("a greeting came through the relay that was not expected", "restart the run")
        if sender.route.how == "relay, first":
            public_key = self._check(sender, greeting, greeting_digest(sender.greeting or {}))
        else:
            public_key = self._check(sender, greeting)
            self._put(origin, Kind.RELAY_GREETING, "", self._greet(sender, greeting_digest(greeting)))
        pair = (self.name, sender.name)
        outgoing, incoming = f"sealed {self.name}>{sender.name}", f"sealed {sender.name}>{self.name}"
        sender.sealer = Sealer(pairwise_key(self._key, public_key, pair, self._agreement, outgoing), *pair)
        sender.unsealer = Unsealer(
            pairwise_key(self._key, public_key, pair, self._agreement, incoming), sender.name, self.name
        )
        self._connected(sender, public_key)

    def _take_relayed(self, origin: Peer, frame: Frame) -> None:
        """A sealed chunk: open it when it came from the relay, pass it on when this party is the relay."""
        assert isinstance(frame.payload, torch.Tensor)
        if origin.name != self._relay:
            self._require_relayable(origin, origin.name, frame.tag)
            target = self._peers[frame.tag]
            self._counter.of(origin.name).bytes_relayed += frame.size
            try:
                self._put(target, Kind.RELAY, origin.name, frame.payload)
            except LinkError:  # the loss of the receiver is reported where this party waits for it
                log.info("a sealed chunk for %s could not be passed on", target.name)
            return
        sender = self._peers.get(frame.tag)
        if sender is None or sender.unsealer is None:
            raise ProtocolError("a sealed chunk came through the relay that was not expected", "restart the run")
        opened = sender.reader.feed(sender.unsealer.unseal(frame.payload.numpy().tobytes()))
        if opened is not None:
            self._deliver(sender, opened)

    def _require_relayable(self, origin: Peer, sender: Any, receiver: str) -> None:
        target = self._peers.get(receiver)
        if self._relay != self.name or sender != origin.name or target is None or target is origin:
            raise ProtocolError(f"{origin.name} asked to relay what may not be relayed", "give all parties one file")

    # ---- losing ----------------------------------------------------------------------------------------------------

    def _lost(self, peer: Peer, how: str) -> PeerLostError:
        return PeerLostError(
            peer.name, f"lost {peer.name} in phase '{self._counter.phase}' ({how})", f"see the log of {peer.name}"
        )

    def _lose(self, peer: Peer, failure: MpcFlError) -> None:
        with self._changed:
            if not self._closing and not peer.closed and peer.failure is None:
                peer.failure = failure
            if peer.name == self._relay:
                for other in self._peers.values():
                    if other.relayed and not other.closed and other.failure is None and not self._closing:
                        other.failure = failure
            self._changed.notify_all()

    def _raise_first_failure(self, awaited: str | None = None) -> None:
        """A refused hand-shake explains more than the losses it causes, so it is reported first."""
        if self._interruption is not None:
            raise self._interruption
        ignored = self._tolerated - {awaited} if self._started else frozenset[str]()
        failures = [
            peer.failure for peer in self._peers.values() if peer.failure is not None and peer.name not in ignored
        ]
        failures.sort(key=lambda failure: isinstance(failure, PeerLostError))
        if failures:
            raise failures[0]

    def _stop(self, error: BaseException | None) -> None:
        if error is None and self._relay == self.name:
            self._await_farewells()
        with self._changed:
            self._closing = True
        if error is None:
            kind, payload = Kind.BYE, {}
        else:
            # Only messages written for users cross the link: anything else could quote a secret.
            reason = error.for_peers if isinstance(error, MpcFlError) else type(error).__name__
            peer_name = error.peer if isinstance(error, PeerLostError) else None
            kind, payload = Kind.ABORT, {"reason": reason, "cause": peer_name}
        # Through the relay first: its own link must still be open for that.
        for peer in sorted(self._peers.values(), key=lambda peer: not peer.relayed):
            if peer.connected and peer.failure is None and not peer.closed:
                try:
                    self._put(peer, kind, "", payload, timeout=2.0)
                except (LinkError, ProtocolError):
                    log.info("%s could not be told that %s ends", peer.name, self.name)
        talking = [
            peer.conversation
            for peer in self._peers.values()
            if peer.conversation is not None and (peer.connected or not self._started)
        ]
        for conversation in talking:
            conversation.finish()
        wait_for_all(talking, _LINGER if error is None else _LINGER_AFTER_ERROR)
        for conversation in talking:
            conversation.cut()
        for channel in self._channels:
            channel.close()
        if self._server is not None:
            self._server.stop()
        self.set_phase("closed")

    def _await_farewells(self) -> None:
        """A relay stays for those who still need it."""
        deadline = time.monotonic() + self._receive_timeout
        waiting = [peer for peer in self._peers.values() if peer.route.how == "await"]
        with self._changed:
            while len(waiting) > 1 and any(not peer.closed and not peer.gone for peer in waiting):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self._changed.wait(min(remaining, 0.5))

    # ---- frames ----------------------------------------------------------------------------------------------------

    def _put(
        self,
        peer: Peer,
        kind: Kind,
        tag: str,
        payload: torch.Tensor | bytes | dict[str, Any],
        timeout: float | None = None,
    ) -> None:
        deadline = time.monotonic() + (self._receive_timeout if timeout is None else timeout)
        with peer.send_lock:
            traffic = self._counter.of(peer.name)
            for chunk in encode_frame(kind, tag, peer.next_sequence, payload):
                if peer.sealer is not None:
                    assert self._relay is not None
                    seconds = max(0.1, deadline - time.monotonic())
                    self._put(self._peers[self._relay], Kind.RELAY, peer.name, peer.sealer.seal(chunk), seconds)
                else:
                    peer.put_chunk(chunk, deadline, self._counter.phase, kind in (Kind.HELLO, Kind.WELCOME))
                traffic.bytes_sent += len(chunk)
            peer.next_sequence += 1
            traffic.messages_sent += 1

    def _deliver(self, peer: Peer, frame: Frame) -> bool:
        """File a frame; return False when it ends the link."""
        if self._observer is not None:
            self._observer(peer.name, frame)
        if not peer.connected:
            if frame.kind != Kind.WELCOME or peer.route.how != "dial":
                raise ProtocolError("a link did not begin with a greeting", SAME_VERSION)
            self._connected(peer, self._check(peer, frame.payload, greeting_digest(peer.greeting or {})))
        elif frame.kind in (Kind.TENSOR, Kind.OBJECT):
            with self._changed:
                peer.inbox[frame.tag].append(frame)
                self._changed.notify_all()
        elif frame.kind == Kind.RELAY:
            self._take_relayed(peer, frame)
        elif frame.kind == Kind.RELAY_GREETING:
            self._take_relay_greeting(peer, frame.payload)
        elif frame.kind == Kind.ABORT and isinstance(frame.payload, dict):
            reason = str(frame.payload.get("reason"))[:300]
            cause = frame.payload.get("cause") or peer.name
            self._lose(
                peer, PeerLostError(str(cause)[:64], f"{peer.name} stopped: {reason}", f"see the log of {cause}"[:100])
            )
            return False
        elif frame.kind == Kind.BYE:
            with self._changed:
                peer.closed = True
                self._changed.notify_all()
            return False
        else:
            raise ProtocolError("a greeting came twice", "check that both parties run the same version")
        return True

    def _take(self, sender: str, tag: str, deadline: float | None = None) -> Frame:
        peer, tag = self._peers[sender], self._scope + tag
        began = time.monotonic()
        seconds = self._receive_timeout if deadline is None else max(0.0, deadline - began)
        deadline = began + seconds
        with self._changed:
            waited, start = not peer.inbox[tag], peer.starts
            while not peer.inbox[tag]:
                self._raise_first_failure(sender)
                if peer.starts != start:
                    raise self._lost(peer, "it started again")
                if peer.closed:
                    raise self._lost(peer, "it had finished already")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerLostError(
                        sender,
                        f"{sender} is late: nothing for '{tag}' within {seconds:.4g} s "
                        f"in phase '{self._counter.phase}'",
                        f"see the log of {sender}, or raise runtime.receive_timeout",
                    )
                self._changed.wait(remaining)
            frame = peer.inbox[tag].popleft()
            if not peer.inbox[tag]:
                del peer.inbox[tag]
            traffic = self._counter.of(sender)
            traffic.bytes_received += frame.size
            traffic.messages_received += 1
            if waited:
                traffic.waits += 1
                traffic.seconds_waited += time.monotonic() - began
        return frame

    def scoped(self, scope: str) -> Links:
        """The same links for a protocol of its own: its messages and seeds are apart from all others."""
        links = copy.copy(self)
        links._scope = f"{self._scope}{scope}/"
        return links

    # ---- what protocols use ----------------------------------------------------------------------------------------

    @property
    def peers(self) -> list[str]:
        """Names of the peers, in the order given."""
        return list(self._peers)

    @property
    def traffic(self) -> dict[str, dict[str, Traffic]]:
        """Counts by phase and peer."""
        return self._counter.by_phase

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase, of the phases that have ended."""
        return self._counter.phase_seconds

    def seconds_of(self, phase: str) -> float:
        """Seconds spent in a phase so far, the current stay left out."""
        return self._counter.phase_seconds.get(phase, 0.0)

    def set_phase(self, phase: str) -> None:
        """Name what is going on, for counters and for messages about lost parties."""
        self._counter.set_phase(phase)

    def send_tensor(self, receiver: str, tag: str, tensor: torch.Tensor) -> None:
        """Send a tensor. Raises `PeerLostError` when the receiver is gone or takes nothing until the deadline."""
        self._put(self._peers[receiver], Kind.TENSOR, self._scope + tag, tensor)

    def send_object(self, receiver: str, tag: str, value: dict[str, Any]) -> None:
        """Send a small JSON object (public control data, never a secret)."""
        self._put(self._peers[receiver], Kind.OBJECT, self._scope + tag, value)

    def receive_tensor(
        self,
        sender: str,
        tag: str,
        dtype: torch.dtype,
        shape: Sequence[int] | None,
        deadline: float | None = None,
    ) -> torch.Tensor:
        """The next tensor of `tag` from `sender`, of exactly this dtype and shape (`None`: any shape).

        Waits until `deadline` (of `time.monotonic`), by default for the receive timeout. Raises `PeerLostError` when the
        sender is gone or late, `ProtocolError` when dtype or shape differ.
        """
        frame = self._take(sender, tag, deadline)
        tensor = frame.payload
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            raise ProtocolError(f"{sender} sent no {dtype} tensor for '{tag}'", SAME_VERSION)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ProtocolError(
                f"{sender} sent shape {tuple(tensor.shape)} for '{tag}' instead of {tuple(shape)}",
                "check that all parties use the same configuration",
            )
        return tensor

    def receive_object(self, sender: str, tag: str, deadline: float | None = None) -> dict[str, Any]:
        """The next JSON object of `tag` from `sender`. Waits and raises like `receive_tensor`."""
        payload = self._take(sender, tag, deadline).payload
        if not isinstance(payload, dict):
            raise ProtocolError(f"{sender} sent a tensor for '{tag}'", SAME_VERSION)
        return payload

    def alive(self, peer: str) -> bool:
        """Whether the peer is connected and, as far as this party knows, still there."""
        state = self._peers[peer]
        return state.connected and state.failure is None and not state.closed

    def require_all(self) -> None:
        """Raise what a wait would raise now: for a lost peer, or after `interrupt`."""
        with self._changed:
            self._raise_first_failure()

    def interrupt(self, error: MpcFlError) -> None:
        """End this party's waits with `error`, from another thread: those who wait for messages, and for peers."""
        with self._changed:
            self._interruption = error
            self._changed.notify_all()

    def await_any(self, tags: Mapping[str, str], deadline: float) -> str | None:
        """The first of these peers of which a message of its tag has arrived, or that is lost; `None` at the deadline."""
        with self._changed:
            while True:
                self._raise_first_failure()
                for name, tag in tags.items():
                    peer = self._peers[name]
                    if peer.inbox.get(self._scope + tag) or peer.failure is not None or peer.closed:
                        return name
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._changed.wait(remaining)

    def await_change(self, seconds: float) -> None:
        """Wait until something arrives, is lost or connects, for at most `seconds`."""
        with self._changed:
            self._changed.wait(seconds)

    def waiting(self, sender: str, tag: str) -> bool:
        """Whether a message of `tag` from `sender` has arrived."""
        return bool(self._peers[sender].inbox.get(self._scope + tag))

    def key_fingerprint(self, party: str) -> str:
        """SHA-256 of the X25519 public key of a peer or of this party: it says which start of a process this is."""
        key = self._public_key() if party == self.name else self._peers[party].public_key
        return "" if key is None else hashlib.sha256(key).hexdigest()

    def pairwise_seed(self, peer: str, purpose: str) -> Seed:
        """A seed that only this party and `peer` know, fresh for this run and bound to both names, session and purpose.

        From the X25519 keys of the signed greetings (`handshake.pairwise_key`): a relay between the two does not know it.
        Raises `SecrecyError` when it was given before, because a second holder could draw its values again.
        """
        public_key = self._peers[peer].public_key
        purpose = self._scope + purpose
        if public_key is None:
            raise LinkError(f"{peer} is not connected", "connect before deriving secrets")
        if (peer, public_key, purpose) in self._seeds_given:
            raise SecrecyError(f"the seed with {peer} for '{purpose}' was asked for twice: its values would repeat")
        self._seeds_given.add((peer, public_key, purpose))
        return Seed(pairwise_key(self._key, public_key, (self.name, peer), self._agreement, purpose))
