"""How a party ends, as its peers hear it: BYE, or ABORT with a reason and the party that is the cause; or that it never came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpc_fl.errors import MpcFlError, PeerLostError, PeerRefusedError, printable
from mpc_fl.links.frames import Kind

_LONGEST_REASON, _LONGEST_NAME = 300, 64


def parting_message(error: BaseException | None) -> tuple[Kind, dict[str, Any]]:
    """What a party says last: BYE, or ABORT with a reason that peers may be told (`loss_of` reads it)."""
    if error is None:
        return Kind.BYE, {}
    # Only messages written for users cross the link: anything else could quote a secret.
    reason = error.for_peers if isinstance(error, MpcFlError) else type(error).__name__
    return Kind.ABORT, {
        "reason": reason,
        "cause": _cause(error),
    }


def _cause(error: BaseException) -> str | None:
    """Whom a party blames for its end; None when it is its own."""
    if isinstance(error, PeerLostError):
        return error.cause
    return error.peer if isinstance(error, PeerRefusedError) else None


def loss_of(sender: str, said: dict[str, Any]) -> PeerLostError:
    """The loss of a party that ended with ABORT, as it explained it: it is lost, whomever it blames."""
    reason = printable(str(said.get("reason")), _LONGEST_REASON)
    cause = printable(str(said.get("cause") or sender), _LONGEST_NAME)
    return PeerLostError(sender, f"{sender} stopped: {reason}", f"see the log of {cause}", cause)


def never_came(missing: Mapping[str, str], seconds: float) -> PeerLostError:
    """The loss of peers that were never connected, each with why somebody of its name was refused, if anybody was."""
    refused = [name for name, why in missing.items() if why]
    why = "".join(f"; {name} was refused: {missing[name]}" for name in refused)
    what = f"{', '.join(missing)} did not connect within {seconds:g} s{why}"
    fix = "check that it runs and that its address is right"
    if len(missing) > 1 and not refused:
        fix = "check that they run, their addresses, and this party's own address and certificate"
    return PeerLostError((refused or list(missing))[0], what, fix)
