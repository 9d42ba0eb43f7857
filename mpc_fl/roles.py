"""roles"""

from __future__ import annotations

import re

from mpc_fl.errors import (
    IdentityError,
)

AGGREGATOR, DEALER = "aggregator", "dealer"


PARTY_NAME = re.compile(r"aggregator|dealer|model-owner|hospital-(?:0|[1-9][0-9]{0,2})")


def role_of(name: str) -> str:
    """The role a party name implies: 'hospital-2' -> 'hospital'."""
    return name.rsplit("-", 1)[0] if name.startswith("hospital-") else name


def check_party_name(name: str) -> str:
    """The same name. Raises `IdentityError` when no party of a federation can have it."""
    if not PARTY_NAME.fullmatch(name):
        raise IdentityError(
            f"'{name[:40]}' is no party name", "the parties are hospital-<n>, aggregator, dealer and model-owner"
        )
    return name


def split_name(name: str) -> tuple[str, int]:
    """('hospital-2') -> ('hospital', 2); other roles have rank 0."""
    if name.startswith("hospital-"):
        return "hospital", int(name.rsplit("-", 1)[1])
    return name, 0


HOSPITAL, MODEL_OWNER = "hospital-0", "model-owner"
