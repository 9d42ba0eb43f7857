"""The reveal ledger of a training run: when the parties of a round sign, and which public values they vouch for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from cryptography import x509

from mpc_fl.aggregation.rules import Rules, require_hospitals, require_quorum
from mpc_fl.aggregation.words import names_in, next_word, say
from mpc_fl.audit.co_signing import CoSigners
from mpc_fl.audit.ledger_file import RevealLedger, tensor_digest
from mpc_fl.config.config import Config
from mpc_fl.config.site_rules import require_trusted, rules_of
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.crypto.identity_files import load_identity, write_file
from mpc_fl.crypto.signatory import Signatory, fingerprint
from mpc_fl.errors import SAME_VERSION, MpcFlError, PeerLostError, ProtocolError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests
from mpc_fl.learning.models.model_file import model_file
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import site_directory
from mpc_fl.roles import AGGREGATOR

log = logging.getLogger(__name__)


def begin_ledger(ledger: RevealLedger, links: Links, config: Config, plan: RoundPlan) -> None:
    """Before the first opening, and whenever a hospital joins: all sign who they are, and get the blocks they lack.

    A ledger that has the end of the run goes on where this party's own configuration has more rounds. What is said goes over
    a scope of `links` for this beginning alone (`RoundPlan.beginning`), which ends. Raises `PeerLostError` when a party is lost or
    late.
    """
    links = plan.beginning(links)
    links.set_phase("reveal ledger")
    signers = CoSigners(ledger, links, [*plan.hospitals, AGGREGATOR], AGGREGATOR)
    try:
        signers.begin(
            config.federation.session,
            config.digest(),
            config.federation.quorum_size,
            plan.resumed,
            goes_on=plan.number <= config.training.rounds,
        )
    finally:
        links.end_scope()


def require_allowed_leader(ledger: RevealLedger, config: Config) -> None:
    """Once the ledger has begun: raise `ConfigError` where the rules of this site name other aggregators than this one."""
    for file in rules_of(config):
        require_trusted(file, "leaders", fingerprint(ledger.chain.certificates[AGGREGATOR]))


def require_allowed_members(certificates: Iterable[x509.Certificate], config: Config) -> None:
    """Among peers, where each leads in its turn: raise `ConfigError` where the rules of this site name others that may lead."""
    for file in rules_of(config):
        for certificate in certificates:
            require_trusted(file, "leaders", fingerprint(certificate))


def figure_digest(figure: float) -> str:
    """How a figure of validation stands in the reveal ledger, float64 ()."""
    return tensor_digest(torch.tensor(figure, dtype=torch.float64))


@dataclass(frozen=True)
class RoundSigned:
    """What is signed of a round beside its openings: the model that all have, and the `figure` of validation, if any."""

    about: str
    held: ModelDigests
    figure: float | None = None


def lead_signatures(
    ledger: RevealLedger, links: Links, rules: Rules, hospitals: tuple[str, ...], what: RoundSigned
) -> tuple[str, ...]:
    """Step 7 at the aggregator: all of `hospitals` that are left sign the openings since the block before, and `what`.

    The figure comes with the word to sign. Returns those who signed; raises `QuorumError`.
    """
    about = what.about
    links.set_phase(f"{about} signatures")
    asked = hospitals
    for attempt in range(len(asked)):
        figure = {} if what.figure is None else {"figure": what.figure}
        say(links, hospitals, "sign", hospitals=list(hospitals), attempt=attempt, **figure)
        try:
            _sign(ledger, links, hospitals, replace(what, about=f"{about} ({attempt})" if attempt else about))
            return hospitals
        except PeerLostError as error:
            if not rules.closing:
                raise
            log.warning("%s; the others sign without it", error)
            hospitals = tuple(name for name in hospitals if name != error.peer and links.alive(name))
            require_quorum(rules, hospitals, asked, f"{about} signatures")
    raise AssertionError("each attempt has one hospital less")


def sign_round(ledger: RevealLedger, links: Links, rules: Rules, about: str, held: ModelDigests) -> bool:
    """Step 7 at a hospital, as often as the aggregator asks for it: each time with one hospital less, never too few.

    Returns whether this hospital has signed: False when it was late, and the others sign without it.
    """
    links.set_phase(f"{about} signatures")
    for attempt in range(len(rules.hospitals)):
        word = next_word(links, AGGREGATOR, ("sign",))
        hospitals = names_in(word, "hospitals")
        require_hospitals(rules, hospitals, links.name)
        signed = RoundSigned(f"{about} ({attempt})" if attempt else about, held, figure_in(word.get("figure")))
        try:
            _sign(ledger, links, hospitals, signed)
            return True
        except PeerLostError as error:
            if error.peer == AGGREGATOR:
                raise
            log.warning("%s", error)
            if error.peer == links.name:
                return False
    raise ProtocolError(f"{AGGREGATOR} had '{about}' signed too often", "it does not follow the protocol")


def figure_in(said: object) -> float | None:
    """A figure of validation as the aggregator said it, None for none. Raises `ProtocolError` for what is no share."""
    if said is None:
        return None
    if not isinstance(said, float) or not 0 <= said <= 1:
        raise ProtocolError(f"{AGGREGATOR} sent a figure of validation that cannot be", SAME_VERSION)
    return said


def _sign(ledger: RevealLedger, links: Links, hospitals: tuple[str, ...], what: RoundSigned) -> None:
    parties, same = [*hospitals, AGGREGATOR], {"global model": what.held.parameters}
    if what.figure is not None:
        same["validation"] = figure_digest(what.figure)
    if what.held.calibration:
        same["calibration"] = what.held.calibration
    complete = all(set(opening.among) <= set(parties) for opening in ledger.pending)
    kind = "openings" if complete else "abandoned"
    CoSigners(ledger, links, parties, AGGREGATOR).sign(kind, what.about, same)


def sign_end(ledger: RevealLedger, links: Links, plan: RoundPlan, state: Hospital | Aggregator) -> None:
    """The last block: all sign that the run is complete, and which parameters, or which file, its model is.

    Raises `PeerLostError` when a party is lost or late; then it is planned anew without it.
    `state` is that of the party itself: its model, what all have in common of it, and its normalisation of inputs. A run that
    goes on only because a party could not keep that block has it from `begin_ledger`: nothing more is signed.
    """
    if ledger.chain.ended:
        return
    links.set_phase("reveal ledger")
    same = values_of_end(state)
    about = f"the run is complete ({plan.attempt})" if plan.attempt else "the run is complete"
    CoSigners(ledger, links, [*plan.hospitals, AGGREGATOR], AGGREGATOR).sign("end", about, same)


def values_of_end(state: Hospital | Aggregator) -> dict[str, str]:
    """What the last block vouches for: the global parameters, and the model's file where all have the same."""
    same = {"global model": tensor_digest(state.shared_parameters)}
    if not state.config.training.local_normalisation:
        written = model_file(state.model, state.config, state.normalisation, state.calibration)
        same["model.safetensors"] = hashlib.sha256(written).hexdigest()
    return same


def signed_model(ledger: RevealLedger, number: int) -> str | None:
    """The digest of the global parameters that all signed last after round `number`; `None` when they have not."""
    return ledger.signed_value(f"round {number}", "global model")


def require_signed_model(ledger: RevealLedger, number: int, held: ModelDigests) -> None:
    """At a hospital that joins: it was given the global model that all signed after round `number`. Raises `ProtocolError`."""
    if signed_model(ledger, number) != held.parameters:
        raise ProtocolError(
            f"{AGGREGATOR} sent another global model than all parties signed after round {number}",
            "nothing was sent to it; compare the reveal ledgers, and the aggregator's checkpoints with its ledger",
        )


def require_signed_calibration(ledger: RevealLedger, number: int, held: ModelDigests) -> None:
    """The same of what calibrates the final model, fitted in round `number`. Raises `ProtocolError`."""
    if ledger.signed_value(f"round {number}", "calibration") != held.calibration:
        raise ProtocolError(
            f"{AGGREGATOR} sent another calibration than all parties signed after round {number}",
            "compare the reveal ledgers, and the aggregator's checkpoints with its ledger",
        )


def signatory_of(ledger: RevealLedger) -> Signatory:
    """Who signs what this party confirms, and checks it by the certificates of all in the ledger."""
    return Signatory(ledger.identity, lambda name: ledger.chain.certificates.get(name))


def open_ledger(config: Config, name: str) -> RevealLedger:
    """This party's reveal ledger in its directory, with the authority's certificate beside it, to verify it with.

    Raises `MpcFlError` when the one there was changed, or is that of an earlier run and this one shall not go on with it.
    """
    assert config.site.identity is not None  # `connect` came first
    identity = load_identity(config.site.identity, name, config.federation.chosen_names)
    ledger = RevealLedger(site_directory(config), identity)
    if ledger.blocks and not config.site.resume:
        raise MpcFlError(
            f"{ledger.path} is the ledger of an earlier run", "choose another directory, or go on with --resume"
        )
    write_file(ledger.path.with_name(ROOT_FILE), identity.authority)
    return ledger
