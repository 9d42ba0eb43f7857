"""What a protocol sees of its links: typed messages to and from named peers, a deadline on every wait.

`Links` is the face that protocols use, whatever carries the bytes: `network.NetworkLinks` between processes,
`in_memory.InMemoryLinks` between threads of one process, for tests. Both stand on the same mailboxes (`mailboxes`), frames
(`frames`) and keys (`keys`), so that refusals, deadlines, losses and counts are the same. A party that ends well says BYE;
one that fails says ABORT with its reason; a link that ends without either is a lost party. This package moves bytes and
does no arithmetic.
"""

from __future__ import annotations

import abc
import copy
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, MpcFlError, ProtocolError
from mpc_fl.links.frames import Kind, Payload
from mpc_fl.links.keys import PairwiseKeys
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.traffic import Traffic, TrafficCounter

log = logging.getLogger(__name__)

AnyLinks = TypeVar("AnyLinks", bound="Links")


class Links(abc.ABC):
    """This party's links to its peers. Use as a context manager; leaving it with an error tells the peers why.

    A subclass carries the frames: it gives what arrives to the mailboxes, and says there who connected, ended or is lost.
    """

    def __init__(self, name: str, mailboxes: Mailboxes, keys: PairwiseKeys, counter: TrafficCounter) -> None:
        self.name = name
        self._mailboxes = mailboxes
        self._keys = keys
        self._counter = counter
        self._scope = ""
        self._seconds: float | None = None
        self._void: str | None = None
        self._stays_for = set(mailboxes.peers)

    @abc.abstractmethod
    def _open(self) -> None:
        """Begin to make the links, without waiting for the peers."""

    @abc.abstractmethod
    def _close(self, error: BaseException | None) -> None:
        """Tell the peers how this party ends, and end the links."""

    @abc.abstractmethod
    def _send(self, receiver: str, kind: Kind, tag: str, payload: Payload) -> None:
        """Send one frame. Raises `LinkError` when the receiver is lost, was never connected, or takes nothing."""

    def __enter__(self: AnyLinks) -> AnyLinks:
        try:
            self._open()
            self._mailboxes.await_all_connected()
        except BaseException as error:
            self._stop(error)
            raise
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._stop(error)

    def _stop(self, error: BaseException | None) -> None:
        self._close(error)
        self.set_phase("closed")

    def scoped(self: AnyLinks, scope: str) -> AnyLinks:
        """The same links for a protocol of its own: its messages and seeds are apart from all others."""
        links = copy.copy(self)
        links._scope = f"{self._scope}{scope}/"
        return links

    def within(self: AnyLinks, seconds: float) -> AnyLinks:
        """The same links, over which a peer has so many seconds to take one message; by default it has the receive timeout."""
        links = copy.copy(self)
        links._seconds = seconds
        return links

    def voided_by(self: AnyLinks, tag: str) -> AnyLinks:
        """The same links for what a peer gives up with an object of `tag`, whose "reason" is a text: whatever scope a wait is in,
        for a message that the peer has not sent before it raises `SumLostError`."""
        links = copy.copy(self)
        links._void = self._scope + tag
        return links

    @property
    def session(self) -> str:
        """The name of the session that this party and its peers have agreed on."""
        return self._keys.session

    @property
    def peers(self) -> list[str]:
        """Names of the peers, in the order given."""
        return self._mailboxes.peers

    @property
    def traffic(self) -> dict[str, dict[str, Traffic]]:
        """Counts by phase and peer."""
        return self._counter.by_phase

    @property
    def counter(self) -> TrafficCounter:
        """Counts by phase and peer, and what was spent by phase, of the phases that have ended."""
        return self._counter

    def seconds_of(self, phase: str) -> float:
        """Seconds spent in a phase so far, the current stay left out."""
        spent = self._counter.spent.get(phase)
        return 0.0 if spent is None else spent.seconds

    def deadline(self) -> float:
        """Until when (of `time.monotonic`) a wait lasts that begins now and says nothing else: for several waits in one."""
        return time.monotonic() + self._mailboxes.timeouts.receive

    def set_phase(self, phase: str) -> None:
        """Name what is going on, for counters and for messages about lost parties."""
        self._counter.set_phase(phase)

    def send_tensor(self, receiver: str, tag: str, tensor: torch.Tensor) -> None:
        """Send a tensor. Raises `PeerLostError` when the receiver is gone or takes nothing until the deadline."""
        self._send(receiver, Kind.TENSOR, self._scope + tag, tensor)

    def send_object(self, receiver: str, tag: str, value: dict[str, Any]) -> None:
        """Send a small JSON object (public control data, never a secret)."""
        self._send(receiver, Kind.OBJECT, self._scope + tag, value)

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
        sender is gone or late, `SumLostError` when it has given up (`voided_by`), `ProtocolError` when dtype or shape differ.
        """
        frame = self._mailboxes.take(sender, self._scope + tag, deadline, self._void)
        tensor = frame.payload
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            raise ProtocolError(f"{sender} sent no {dtype} tensor for '{tag}'", SAME_VERSION, sender)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ProtocolError(
                f"{sender} sent shape {tuple(tensor.shape)} for '{tag}' instead of {tuple(shape)}",
                "check that all parties use the same configuration",
                sender,
            )
        if shape is not None:
            self._mailboxes.was_asked_for(frame)
        return tensor

    def receive_object(self, sender: str, tag: str, deadline: float | None = None) -> dict[str, Any]:
        """The next JSON object of `tag` from `sender`. Waits and raises like `receive_tensor`."""
        payload = self._mailboxes.take(sender, self._scope + tag, deadline, self._void).payload
        if not isinstance(payload, dict):
            raise ProtocolError(f"{sender} sent a tensor for '{tag}'", SAME_VERSION, sender)
        return payload

    def alive(self, peer: str) -> bool:
        """Whether the peer is connected and, as far as this party knows, still there."""
        return self._mailboxes.alive(peer)

    def came(self, peer: str) -> bool:
        """Whether the peer's greeting was accepted, of its present start; it may have gone since."""
        return self._mailboxes.connected(peer)

    def learn_address(self, peer: str, address: str) -> None:
        """A peer said where it can be dialled (host:port), which this party did not know; nothing to do where links need none."""
        log.debug("%s is at %s", peer, address)

    def learn_relays(self, peer: str, relays: Sequence[str]) -> None:
        """A peer said that it can only dial out, and through which parties it is reached; nothing to do where links need none."""
        log.debug("%s is reached through %s", peer, ", ".join(relays))

    def stay_for(self, peers: Collection[str]) -> None:
        """At the end a relay stays for these alone: others that are still linked with it take part in nothing any more."""
        self._stays_for = set(peers)

    def require_all(self) -> None:
        """Raise what a wait would raise now: for a lost peer, or after `interrupt`."""
        self._mailboxes.require_all()

    def interrupt(self, error: MpcFlError) -> None:
        """End this party's waits with `error`, from another thread: those who wait for messages, and for peers."""
        self._mailboxes.interrupt(error)

    def await_any(self, tags: Mapping[str, str], deadline: float) -> str | None:
        """The first of these peers of which a message of its tag has arrived, or that is lost or has given up (`voided_by`);
        `None` at the deadline."""
        return self._mailboxes.await_any({name: self._scope + tag for name, tag in tags.items()}, deadline, self._void)

    def await_change(self, seconds: float) -> None:
        """Wait until something arrives, is lost or connects, for at most `seconds`."""
        self._mailboxes.await_change(seconds)

    def waiting(self, sender: str, tag: str) -> bool:
        """Whether a message of `tag` from `sender` has arrived."""
        return self._mailboxes.waiting(sender, self._scope + tag)

    def forget(self, tag: str) -> None:
        """Nobody waits for messages of `tag` any more: what has arrived of it is dropped, and what still comes."""
        self._mailboxes.forget(self._scope + tag)

    def end_scope(self) -> None:
        """`forget` all tags of this scope (`scoped`), which is not used again."""
        if not self._scope:
            raise ValueError("only a scope can end")
        self._mailboxes.forget(self._scope)

    def key_fingerprint(self, party: str) -> str:
        """SHA-256 of the X25519 public key of a peer or of this party: it says which start of a process this is."""
        return self._keys.fingerprint(party)

    def pairwise_seed(self, peer: str, purpose: str) -> Seed:
        """A seed that only this party and `peer` know, fresh for this run and bound to both names, session and purpose.

        From the X25519 keys of the signed greetings (`handshake.pairwise_key`): a relay between the two does not know it.
        Raises `SecrecyError` when it was given before, because a second holder could draw its values again.
        """
        return self._keys.seed(peer, self._scope + purpose)
