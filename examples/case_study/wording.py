"""How the article says figures, and what it calls networks."""

from __future__ import annotations

from mpc_fl.apps.formats import percent
from mpc_fl.evidence.shortcuts_tested import Estimate

_NETWORKS = {
    "lite0": "EfficientNet-Lite0",
    "scattering": "scattering",
    "small": "the small network",
    "both": "both networks",
}


def network_name(features: str) -> str:
    """A network as sentences call it."""
    return _NETWORKS.get(features, features)


def capital(text: str) -> str:
    """With a large first letter, for the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def at_epsilon(epsilon: float | None) -> str:
    """Under which promise, in words."""
    return "without privacy" if epsilon is None else f"at epsilon {epsilon:g}"


def interval(of: Estimate) -> str:
    """A share with its interval."""
    return f"{percent(of.value)} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def points(of: Estimate) -> str:
    """A difference of shares in percentage points with its interval."""
    return f"{100 * of.value:+.1f} points ({100 * of.low:+.1f} to {100 * of.high:+.1f})"


def verdict(of: Estimate) -> str:
    """What a difference shows."""
    return "better" if of.low > 0 else "worse" if of.high < 0 else "not shown to be better or worse"
