"""Where a batch lies in the pools of both parties: a number and a tag, as messages say them (see `party_pools`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.inference.fast.preprocessing.sealed_file import TAG_BYTES

POOL = "pool"  # tag of the words in which two halves of a pool meet
# Batches of a pool are numbered from here in messages, those of the dealer from 0.
FIRST_NUMBER = 1 << 32
MOST_BATCHES = 1 << 20  # that a pool ever holds


@dataclass(frozen=True)
class Place:
    """A batch in both pools: its number, and the tag that both halves have in common."""

    number: int
    tag: str

    def message(self) -> dict[str, Any]:
        """As part of a message."""
        return {"place": self.number, "tag": self.tag}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Place:
        """Raises `ProtocolError` for anything else."""
        number, tag = message.get("place"), message.get("tag")
        if type(number) is not int or not 0 <= number <= MOST_BATCHES or not isinstance(tag, str):
            raise ProtocolError("a batch of a pool was announced without its place", SAME_VERSION)
        if len(tag) != 2 * TAG_BYTES or not set(tag) <= set("0123456789abcdef"):
            raise ProtocolError("a batch of a pool was announced without its tag", SAME_VERSION)
        return cls(number, tag)
