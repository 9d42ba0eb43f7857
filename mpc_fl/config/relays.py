"""Relays among peers: who passes on what hospitals say that can only dial out, and what must hold for them. Pure."""

from __future__ import annotations

from mpc_fl.config.deployment import FederationSection, RuntimeSection

_BEYOND_SILENCE = 15.0  # seconds: two signs of life, which a peer behind relays is given longer, and one more


def relays_among_peers(federation: FederationSection) -> tuple[str, ...]:
    """Those named in `federation.relay`, else all founders that others can dial."""
    if federation.relay is not None:
        return federation.named_relays
    return tuple(name for name in federation.founding if name not in federation.dial_out_only)


def require_relays(federation: FederationSection, runtime: RuntimeSection) -> None:
    """Hospitals that can only dial out reach each other, and an answer is not late because a relay stops. Raises `ValueError`."""
    relays = relays_among_peers(federation)
    for name in relays:
        if name not in federation.founding:
            raise ValueError(f"federation.relay names {name}, which joins later; name founders, which have addresses")
    if len(federation.dial_out_only) > 1 and not relays:
        raise ValueError(
            "two of federation.dial_out_only need a hospital that both can dial, and there is none; give one of them an address"
        )
    least = runtime.silence_timeout + _BEYOND_SILENCE
    if federation.dial_out_only and runtime.receive_timeout < least:
        # A relay that stops is found, and what it held arrives by another way, before anybody is late for it.
        raise ValueError(
            "with federation.dial_out_only an answer may take as long as it takes to find that a relay has stopped; set "
            f"runtime.receive_timeout to {least:g} or more"
        )
