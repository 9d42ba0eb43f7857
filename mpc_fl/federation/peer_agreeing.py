"""What hospitals sign together under a view of a round among peers: a proposal, or that a complete block is finished under it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpc_fl.aggregation.signed_words import has_said, heard, repeated, require_one_version, say_signed
from mpc_fl.aggregation.words import Deadlines, hear_all
from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.errors import ProtocolError
from mpc_fl.federation.peer_presence import Presence, Standing
from mpc_fl.federation.peer_proposal import DEVIATES, Complete, Proposal, Proposals
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain


@dataclass(frozen=True)
class Agreeing:
    """A hospital's part in it. `answer`: seconds that an answer may take."""

    domain: SecretDomain
    proposals: Proposals
    answer: float

    def links(self, number: int, view: int, what: str = "agreed") -> Links:
        """Links for what is signed under a view."""
        return self.domain.links.scoped(f"{what} {number} {view}")

    def sign_together(self, proposal: Proposal, linked: Sequence[str]) -> None:
        """Sign a proposal that this hospital is in, and hear that all that are in it have. One that is left out hears it, too: what
        a proposer tells it alone is no proposal."""
        domain, plan, mine = self.domain, proposal.plan, {proposal.proposer: proposal.signed}
        links, me = self.links(*plan.round_of), domain.links.name
        about, agreed = (self.proposals.subject(word, plan.round_of) for word in ("proposal", "agreed"))
        others = [name for name in plan.hospitals if name != me]

        def take(name: str, word: dict[str, Any]) -> None:
            heard(domain, name, agreed, word)
            require_one_version(domain, name, about, mine, word.get("repeated"))

        try:
            if me in plan.hospitals:  # to all: a hospital that was told another proposal waits for this one, too
                say_signed(domain, links, linked, agreed, {"repeated": repeated(mine)})
            now = time.monotonic()
            hear_all(links, others, "agreed", take, (Deadlines(f"round {plan.number}", now, self.answer), 0))
        finally:
            links.end_scope()

    def finish_together(self, view_of: tuple[int, int], block: Block, names: Sequence[str]) -> Complete:
        """Before a complete block of an earlier view is finished: all of `names`, its parties that are there, sign that it is
        under this view, so that whoever has it can show that later. Raises like any word that all say."""
        links, subject = self.links(*view_of, "finishing"), self.proposals.subject("finish", view_of)
        values, signed, now = {"seal": block.seal()}, dict[str, str](), time.monotonic()

        def take(name: str, word: dict[str, Any]) -> None:
            if not has_said(self.domain, name, subject, values, word.get("signature")):
                raise ProtocolError(f"{name} does not finish the block that it agreed to finish", DEVIATES, name)
            signed[name] = str(word["signature"])

        try:
            own = say_signed(self.domain, links, names, subject, values)
            # Another one may still wait for the block, in vain, and say so.
            deadlines = Deadlines(f"round {view_of[0]}", now, 2 * self.answer)
            hear_all(links, names, "finish", take, (deadlines, 0))
        finally:
            links.end_scope()
        return Complete(view_of[1], block, {**signed, self.domain.links.name: own.signature})


def require_no_difference(
    standing: Standing, proposal: Proposal, mine: Presence, alive: Mapping[str, Presence], was_time: bool
) -> None:
    """An exact sum that was opened is not made anew without somebody who was in it and is there: the difference would be that
    one's summand. `alive`: what each member that is linked said last of itself; `was_time`: all had as long as who proposes waits.

    Raises `ProtocolError` naming who proposed it. Nobody is there who leaves, who has said nothing under this view though there
    was time (who proposes may be quicker), or with whom most of the proposal are not linked or have lost a sum: else one that
    was in it could keep the others from ever going on.
    """
    plan, present = proposal.plan, proposal.present.values()
    lost = Counter(one.lost for one in present)
    for name in () if plan.normalised else standing.among:
        said = alive.get(name)
        if name in plan.hospitals or said is None or said.leaves or (was_time and said.view_of != mine.view_of):
            continue
        is_alike = (said.number, said.place) == (standing.number, mine.place)
        linked = sum(one.held.get(name) == said.held.get(name) for one in present)
        if is_alike and 2 * linked > len(present) and 2 * lost[name] <= len(present):
            what = (
                f"{proposal.proposer} would make a sum of round {standing.number} anew without {name}, which is there"
            )
            raise ProtocolError(what, "nothing was sent under its proposal: the difference would be one summand")
