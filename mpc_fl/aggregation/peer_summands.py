"""What a hospital has of the masked summands of a sum among peers when all have come, and before anybody is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpc_fl.aggregation.sketch import SignHash
from mpc_fl.aggregation.slices import Slices
from mpc_fl.aggregation.words import Deadlines
from mpc_fl.sharing.closed_sum import KeyCommitments


@dataclass(frozen=True, repr=False)
class PeerSummands:
    """The masked summands y_i of all of U at one hospital, of which all have heard the same: a check (`rules.PeerCheck`) takes it.

    `own` are the slices of its own, `held` those of each other hospital that this one keeps, by sender and slice, each (length,);
    `hashes` are those that all signed of theirs. `commitments` are those to the keys of all masks, `committed` what each said for
    the check. `bound` is the digest of all of that; `deadlines` are those of the check's steps.
    """

    slices: Slices
    own: Mapping[str, torch.Tensor]
    held: Mapping[str, Mapping[str, torch.Tensor]]
    hashes: Mapping[str, Mapping[str, str]]
    commitments: KeyCommitments
    committed: Mapping[str, object]
    bound: str
    deadlines: Deadlines

    @property
    def hospitals(self) -> tuple[str, ...]:
        """U, in order."""
        return self.slices.hospitals

    def keeper(self, hospital: str) -> str:
        """Who keeps a copy of what a hospital opens of its own summand."""
        return self.slices.keeper(hospital, self.hospitals)

    def kept_by(self, keeper: str, sender: str) -> list[str]:
        """The slices of the sender's summand that another hospital has."""
        return [keeper, sender] if self.keeper(sender) == keeper else [keeper]

    def folded(self, sign_hash: SignHash, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sketch of these slices of a summand, (buckets,)."""
        folds = [sign_hash.fold_part(words, self.slices.place(piece).start) for piece, words in parts.items()]
        return torch.stack(folds).sum(0, dtype=folds[0].dtype)
