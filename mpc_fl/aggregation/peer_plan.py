"""What hospitals agree on before a peer sum: all of U sign the transcript T that each has computed, before anything is masked.

`peer_sum` takes the plan from here. The words ("transcript", or "void" where somebody gives up) come in a scope of the sum.
Hospitals that were told different things, or hold different models, have different transcripts, and find that out here:
nothing was sent then. One round of messages, some 200 bytes from each hospital to each other one.
"""

from __future__ import annotations

import time
from typing import Any

from mpc_fl.aggregation.rules import AgreedSum, Rules, require_hospitals
from mpc_fl.aggregation.signed_words import Subject, heard, say_signed
from mpc_fl.aggregation.transcript import transcript_of
from mpc_fl.aggregation.words import Deadlines, hear_all, say
from mpc_fl.errors import MpcFlError, PeerLostError, SumLostError
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

_WORD = "transcript"


def signed_plan(domain: SecretDomain, rules: Rules, agreed: AgreedSum) -> SumPlan:
    """At a hospital of U: the plan of a peer sum whose T all of U have signed, with the rules' opener as its proposer.

    Raises `SumLostError` where one of U is lost or late or gives up, `ProtocolError` for a U that may not be summed over, and
    naming a hospital that signed another T: its hospitals, keys, model, weights or rules differ.
    """
    require_hospitals(rules, agreed.hospitals, domain.links.name)
    transcript = transcript_of(domain.links, rules, agreed, agreed.hospitals, 0)
    closing = min(rules.closing, len(agreed.hospitals) - 1)
    plan = SumPlan(
        agreed.hospitals, rules.opener, (*agreed.label, 0), closing, transcript, apart=rules.check is not None
    )
    links, why, subject = domain.links.scoped(f"transcript {plan.name}"), agreed.about.why, Subject(transcript, _WORD)
    others, now = [name for name in plan.hospitals if name != links.name], time.monotonic()

    def take(name: str, word: dict[str, Any]) -> None:
        heard(domain, name, subject, word)

    try:
        say_signed(domain, links, others, subject, {})
        hear_all(links, others, _WORD, take, (Deadlines(why, now, links.deadline() - now), 0))
    except MpcFlError as error:
        say(links, others, "void", reason=error.for_peers)
        if isinstance(error, PeerLostError):
            what = f"'{why}' cannot begin: {error.what}"
            raise SumLostError(what, "its summands are made anew", error.peer) from None
        raise
    finally:
        links.end_scope()
    return plan
