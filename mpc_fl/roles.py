"""Names and roles of the parties: the only place that spells them and takes them apart.

A federation has hospitals and up to three servers. A server's name is its role: `AGGREGATOR`, `DEALER`, `MODEL_OWNER`. The
hospital of rank k is named by `hospital_name(k)`; nothing else may rely on how that name looks. These names are identities:
they are in certificates, in the ledger of openings and in the folders of a run. What sites call themselves is in `chosen_names`.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from mpc_fl.errors import IdentityError

HOSPITAL_ROLE = "hospital"
AGGREGATOR: Final = "aggregator"
DEALER, MODEL_OWNER = "dealer", "model-owner"
Coordinator = Literal["aggregator", "none"]  # who proposes rounds and opens sums: one party, or the hospitals in turn

_HOSPITAL_NAME = re.compile(r"hospital-(0|[1-9][0-9]{0,2})")  # three digits: ranks go to 999
_SERVERS = (AGGREGATOR, DEALER, MODEL_OWNER)


def hospital_name(rank: int) -> str:
    """The name of the hospital of a rank, counted from 0."""
    return f"{HOSPITAL_ROLE}-{rank}"


def hospital_names(count: int) -> list[str]:
    """The names of `count` hospitals in rank order."""
    return [hospital_name(rank) for rank in range(count)]


HOSPITAL = hospital_name(0)  # the hospital of a run that has one: it asks for diagnoses


def is_hospital(name: str) -> bool:
    """Whether a party of this name is a hospital."""
    return _HOSPITAL_NAME.fullmatch(name) is not None


def split_name(name: str) -> tuple[str, int]:
    """Role and rank that a party's name implies: 'hospital-2' -> ('hospital', 2); other roles have rank 0."""
    found = _HOSPITAL_NAME.fullmatch(name)
    return (HOSPITAL_ROLE, int(found.group(1))) if found else (name, 0)


def role_of(name: str) -> str:
    """The role that a party's name implies: 'hospital-2' -> 'hospital', 'dealer' -> 'dealer'."""
    return split_name(name)[0]


def check_party_name(name: str) -> str:
    """The same name. Raises `IdentityError` when no party of a federation can have it."""
    if not (is_hospital(name) or name in _SERVERS):
        raise IdentityError(
            f"'{name[:40]}' is no party name", "the parties are hospital-<n>, aggregator, dealer and model-owner"
        )
    return name
