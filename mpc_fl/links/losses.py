"""Why a peer is lost or refused: how that is told to others and heard from them, which of several losses is named. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpc_fl.errors import (
    HandshakeError,
    MpcFlError,
    PeerLostError,
    PeerRefusedError,
    ProtocolError,
    SumLostError,
    printable,
)
from mpc_fl.links.frames import Kind

_LONGEST_REASON, _LONGEST_NAME = 300, 64


class Known(enum.IntEnum):
    """How this party knows of a loss. Of several the one is named that explains most: the lowest here, then the first.

    REFUSED: a hand-shake or frame that does not hold. SILENT: no sign of life, which is never the consequence of another's loss.
    TOLD: the peer said that it ends, and why. VANISHED: its link ended without a word.
    """

    REFUSED = 0
    SILENT = 1
    TOLD = 2
    VANISHED = 3


@dataclass(frozen=True)
class Loss:
    """Why a peer is lost, and how this party knows; `number` counts its losses in their order."""

    failure: MpcFlError
    known: Known
    number: int


def first_named(losses: Iterable[Loss | None]) -> Loss | None:
    """The loss whose failure is named, None without losses."""
    return min(
        (loss for loss in losses if loss is not None), key=lambda loss: (_known(loss), loss.number), default=None
    )


def is_explained(loss: Loss) -> bool:
    """Whether more is known of it than that a link ended: what explains that may come a moment later, from another peer."""
    return _known(loss) != Known.VANISHED


def _known(loss: Loss) -> Known:
    is_refusal = isinstance(loss.failure, ProtocolError | HandshakeError)
    refused = is_refusal or not isinstance(loss.failure, PeerLostError)
    return Known.REFUSED if refused else loss.known


def parting_message(error: BaseException | None) -> tuple[Kind, dict[str, Any]]:
    """What a party says last: BYE, or ABORT with a reason that peers may be told."""
    if error is None:
        return Kind.BYE, {}
    # Only messages written for users cross the link: anything else could quote a secret.
    reason = error.for_peers if isinstance(error, MpcFlError) else type(error).__name__
    return Kind.ABORT, {"reason": reason, "cause": _cause(error)}


def _cause(error: BaseException) -> str | None:
    """Whom a party blames for its end; None when it is its own."""
    if isinstance(error, PeerLostError):
        return error.cause
    return error.peer if isinstance(error, PeerRefusedError) else None


def giving_up(silent: PeerLostError) -> tuple[Kind, dict[str, Any]]:
    """What a silent peer is told, should it wake up: this party goes on, or ends, without it."""
    return Kind.ABORT, {"reason": silent.for_peers, "cause": silent.peer, "gave_up": True}


def gives_up(message: dict[str, Any]) -> bool:
    """Whether an ABORT says that its sender has not heard this party for too long."""
    return message.get("gave_up") is True


def as_heard(sender: str, message: dict[str, Any]) -> PeerLostError:
    """The failure that an ABORT of `sender` means here: it is lost, whomever it blames."""
    reason = printable(str(message.get("reason")), _LONGEST_REASON)
    cause = printable(str(message.get("cause") or sender), _LONGEST_NAME)
    how = "gave this party up" if gives_up(message) else "stopped"
    return PeerLostError(sender, f"{sender} {how}: {reason}", f"see the log of {cause}", cause)


def gave_up(peer: str, message: object) -> SumLostError:
    """The failure of a wait for a peer that has given up what the wait is part of, and said so in this message."""
    reason = message.get("reason") if isinstance(message, dict) else None
    return SumLostError(f"{peer} gave up: {printable(str(reason), _LONGEST_REASON)}", f"see the log of {peer}")


def late(peer: str, tag: str, seconds: float, phase: str) -> PeerLostError:
    """The failure of a peer whose message has not come."""
    return PeerLostError(
        peer,
        f"{peer} is late: nothing for '{tag}' within {seconds:.4g} s in phase '{phase}'",
        f"see the log of {peer}, or raise runtime.receive_timeout",
    )


def without_sign(peer: str, seconds: float, phase: str) -> PeerLostError:
    """The failure of a peer that is silent, in words for everybody."""
    return PeerLostError(
        peer,
        f"{peer} has given no sign of life for {seconds:.0f} s in phase '{phase}' (its process is stopped, or its machine or"
        " network hangs)",
        f"see the log of {peer}, or raise runtime.silence_timeout where links are slow",
    )


def stood_still(name: str, seconds: float, peer: str) -> PeerLostError:
    """What ends a party that was silent itself, so that its peers gave it up: it blames none of them."""
    return PeerLostError(
        peer,
        f"{name} itself stood still for {seconds:.0f} s, and {peer} ended the link with it",
        f"see whether the process of {name} was stopped, or its machine slept",
        cause=name,
    )


def never_came(missing: Mapping[str, str], seconds: float) -> PeerLostError:
    """The loss of peers that were never connected, each with why somebody of its name was refused, if anybody was."""
    refused = [name for name, why in missing.items() if why]
    why = "".join(f"; {name} was refused: {missing[name]}" for name in refused)
    what = f"{', '.join(missing)} did not connect within {seconds:g} s{why}"
    fix = "check that it runs and that its address is right"
    if len(missing) > 1 and not refused:
        fix = "check that they run, their addresses, and this party's own address and certificate"
    return PeerLostError((refused or list(missing))[0], what, fix)


def not_relayable(sender: str) -> ProtocolError:
    """What refuses a frame to be relayed, at a party that is no relay or for parties it does not relay to."""
    return ProtocolError(f"{sender} asked to relay what may not be relayed", "give all parties one file")
