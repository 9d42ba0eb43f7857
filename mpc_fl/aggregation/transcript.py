"""What a party saw of a sum before anything was masked, in one digest, and that all of V saw and confirmed the same.

The transcript T is SHA-256 of everything that a sum depends on, as this party itself has it: the hospitals U and the
fingerprints of the keys it holds of each, the rules, the label with its attempt, what the records will say, and `seen`, what
shapes the summands (session, configuration, digests of the model it received, weights). All masks of the sum are derived
under T (`closed_sum`), so hospitals that were told different things have masks that do not cancel: whoever told them gets a
uniform sum and not the difference of their views (against model inconsistency: Pasquini, Francati, Ateniese, CCS 2022).

Before anything can be opened each hospital of V signs (T, V), and goes on only when it has the signatures of all of V over
its own T and V (the consistency check of Bonawitz et al., CCS 2017, section 6). A hospital signs once for each T. So whoever
leads cannot have two sets opened, nor one over hospitals of which one has not agreed. A leader that is honest checks every
signature against its own T first; one that does not verify at a hospital is therefore the leader's doing.

Cost: one hash of what is received, no round more than the words that are said anyway, some 150 bytes a hospital.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mpc_fl.aggregation.rules import AgreedSum, Rules
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import SAME_VERSION_AND_CONFIGURATION, ProtocolError, SecrecyError
from mpc_fl.sharing.opening import SecretDomain
from mpc_fl.sharing.sum_plan import SumPlan

_TRANSCRIPT = "mpc-fl transcript of a sum 1"
_PURPOSE = "mpc-fl confirmation of a sum 1"


class Fingerprints(Protocol):
    """Whose keys a party holds: its links, or what stands for them in a simulation."""

    def key_fingerprint(self, party: str) -> str:
        """SHA-256 of the X25519 key that is held of a party, in hex."""


def transcript_of(links: Fingerprints, rules: Rules, agreed: AgreedSum, hospitals: Sequence[str], attempt: int) -> str:
    """T of attempt `attempt` at a sum over U, `hospitals`, as this party has it, in hex."""
    about = agreed.about
    seen = {
        "label": [*agreed.label, attempt],
        "hospitals": {name: links.key_fingerprint(name) for name in hospitals},
        "order": list(hospitals),
        "rules": [rules.opener, list(rules.hospitals), rules.smallest, rules.closing, rules.check is not None],
        "about": [about.what, about.why, None if about.privacy is None else dict(about.privacy)],
        "seen": dict(agreed.seen),
    }
    bounds = rules.bounds(len(hospitals))
    if bounds is not None:  # as all compute it alike: who has another graph shall have other masks, too
        seen["masks"] = [rules.colluders, bounds.reach, bounds.least, bounds.closing]
    return digest_of([_TRANSCRIPT, seen])


def confirm(domain: SecretDomain, transcript: str, admitted: Sequence[str]) -> str:
    """This hospital's signature over (T, V), hex. It must not sign another V for this T, nor mask the same value again."""
    return signatory_of(domain).sign(_PURPOSE, _statement(transcript, admitted))


def require_confirmation(
    domain: SecretDomain, hospital: str, transcript: str, admitted: Sequence[str], word: Mapping[str, Any]
) -> str:
    """At the opener: the hospital's signature in its message `word`.

    Raises `ProtocolError` naming the hospital when it is not one over this party's own T and V.
    """
    signature = word.get("confirmation")
    if not signatory_of(domain).is_genuine(hospital, _PURPOSE, _statement(transcript, admitted), signature):
        raise ProtocolError(
            f"{hospital} confirmed another sum than {domain.links.name} leads: its hospitals, keys, model, weights or rules "
            "differ",
            SAME_VERSION_AND_CONFIGURATION,
            hospital,
        )
    assert isinstance(signature, str)
    return signature


def require_all_confirmed(
    domain: SecretDomain, plan: SumPlan, admitted: Sequence[str], word: Mapping[str, Any]
) -> None:
    """At a hospital: all of V signed this hospital's own (T, V), by the opener's word "confirmed".

    In a circle of masks its neighbours in V are enough: each honest one signs once, so neither it nor they open the mask between
    them, and so on around the circle (docs/protocols/sums.md, many hospitals).

    Raises `ProtocolError` naming the opener otherwise: it passed on what it had to check.
    """
    opener, signatures, statement = plan.opener, word.get("signatures"), _statement(plan.transcript, admitted)
    for name in plan.confirmed_by(domain.links.name, admitted):
        signature = signatures.get(name) if isinstance(signatures, dict) else None
        if not signatory_of(domain).is_genuine(name, _PURPOSE, statement, signature):
            raise ProtocolError(
                f"{opener} has no confirmation by {name} of the sum that {domain.links.name} is in: it told them different "
                "hospitals, keys, models, weights or rules",
                f"{opener} does not follow the protocol; nothing of this sum can be opened, do not go on with it",
            )


def signatory_of(domain: SecretDomain) -> Signatory:
    """Who signs at this party. Raises `SecrecyError` where nobody does: closed sums are not made without."""
    if domain.signatory is None:
        raise SecrecyError("a closed sum needs a signatory: its hospitals confirm what they saw")
    return domain.signatory


def _statement(transcript: str, admitted: Sequence[str]) -> bytes:
    return digest_of([_PURPOSE, transcript, list(admitted)]).encode("ascii")


def digest_of(value: Any) -> str:
    """SHA-256, in hex, of a value of JSON's types, whatever the order of the keys of its mappings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()
