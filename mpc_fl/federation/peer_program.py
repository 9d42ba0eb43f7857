"""A hospital in training without an aggregator: from its patients to the final global model, round by round, among peers.

`run` connects, reads the patients and goes through a whole run. Before each round all agree who takes part (`peer_attendance`);
`peer_round` makes it; then all sign a block of the reveal ledger (`audit.peer_signing`), and each keeps it with what was opened.
A round whose sums, or signatures, are lost is made again under the next view, from the state after the last block. What it gave
is not made again where all have it: then only its signatures were missing.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cryptography import x509

from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.peer_record import values_of_refused, without_record
from mpc_fl.audit.peer_signing import PeerSigners
from mpc_fl.audit.reveal_ledger import Block, Members
from mpc_fl.config.config import Config
from mpc_fl.config.deadlines import peer_deadlines_of
from mpc_fl.crypto.certificates import pem
from mpc_fl.crypto.signatory import Signatory, fingerprint
from mpc_fl.errors import ConfigError, LeftOutError, PeerLostError, ProtocolError, QuorumError, SumLostError
from mpc_fl.federation.aggregator_state import prepare_aggregator
from mpc_fl.federation.attendance import RoundPlan
from mpc_fl.federation.audit_trail import figure_digest, open_ledger, require_allowed_members, values_of_end
from mpc_fl.federation.global_model import code_of
from mpc_fl.federation.hospital_program import prepared_hospital
from mpc_fl.federation.own_model import compare_own_model
from mpc_fl.federation.peer_admission import Admission
from mpc_fl.federation.peer_announcements import own_announcements
from mpc_fl.federation.peer_attendance import PeerAttendance
from mpc_fl.federation.peer_certificates import Certificates
from mpc_fl.federation.peer_joining import Giving, Joining
from mpc_fl.federation.peer_presence import Reason, Standing, lost_with
from mpc_fl.federation.peer_proposal import Complete, Proposal
from mpc_fl.federation.peer_result import Result, write_down
from mpc_fl.federation.peer_round import PeerRound, opened_json
from mpc_fl.federation.peer_settling import Settling
from mpc_fl.federation.peer_state import KeptState, Peer, checkpoint, digest_of_common, first_state, resume
from mpc_fl.federation.planning import peer_rules
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.training.process_group import training_group
from mpc_fl.links.frames import Observer
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import connect, site_directory, write_traffic
from mpc_fl.progress import Notify
from mpc_fl.roles import hospital_name
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Train until the last round; write the final global model, what was opened, the ledger, and this site's own metrics."""
    out, name = site_directory(config), hospital_name(rank)
    links = connect(config, name, observer, code_of(config))
    with links:  # first, so that the others hear at once of what this hospital cannot do
        notify("connect", 1, 1)
        hospital, common = prepared_hospital(config, rank, links, notify), prepare_aggregator(config)
        notify("load data", 1, 1)
        with training_group(config, hospital.trained_network) as hospital.group:
            ledger, peer = open_ledger(config, name), first_state(hospital, common)
            _Run(peer, links, ledger, notify).until_complete()
    write_traffic(links, out, config.site.costs)
    compare_own_model(hospital, notify)


class _Run:
    """What a hospital goes through a run with."""

    def __init__(self, peer: Peer, links: Links, ledger: RevealLedger, notify: Notify) -> None:
        config = peer.hospital.config
        self.peer, self.ledger, self.notify, self.links = peer, ledger, notify, links
        self.config, self.rules, deadlines = config, peer_rules(config), peer_deadlines_of(config)
        certificates = Certificates(links, ledger.identity, own_announcements(config, links, ledger.identity))
        self.certificates = certificates.known
        signatory = Signatory(ledger.identity, self.certificates.get)
        present = [name for name in self.rules.hospitals if name == links.name or links.alive(name)]
        self.domain = SecretDomain(links, present, ledger, signatory=signatory)
        about_run = (config.federation.session, config.digest())
        admission = Admission(self.domain, self.rules, about_run, config.federation.admission, self._allows)
        self.giving, founders = Giving(links, ledger, deadlines.answer / 2), tuple(config.federation.founding)
        self.attendance = PeerAttendance(
            self.domain, ledger, deadlines, admission, certificates, founders, self.giving.give
        )
        if ledger.blocks:
            self.attendance.members = ledger.blocks[-1].parties
        if config.site.resume or links.name not in founders:
            self.attendance.ask()
        certificates.await_those([name for name in self.attendance.members if name != links.name], deadlines.beginning)
        self.joining = Joining(peer, self.attendance, deadlines)
        self.results, self.begun_before, self.blocks_before = [Result()], False, len(ledger.blocks)
        self.leave_after = config.site.leave_after

    def _allows(self, certificate: x509.Certificate) -> bool:
        """Whether the rules of this site allow its holder."""
        try:
            require_allowed_members([certificate], self.config)
        except ConfigError as error:
            log.warning("%s", error)
            return False
        return True

    def until_complete(self) -> None:
        """Round after round, until all have signed that the run is complete."""
        first = resume(self.peer, site_directory(self.config), self.ledger) + 1 if self.config.site.resume else 0
        number = first
        while number <= self.config.last_round + 1:
            if self.leave_after is not None and self.leave_after < number <= self.config.last_round:
                self._leave(number)
                return
            before = KeptState.of(self.peer)
            try:
                if not self.ledger.chain.ended or number <= self.config.training.rounds:
                    self._round(number, before)
                number += 1
            except LeftOutError as error:
                log.warning("%s", error)
                before.restore(self.peer)
                number = self._come_back(error)
        self.links.set_phase("conclusion")
        self.attendance.conclude(self.config.last_round + 2)

    def _come_back(self, left_out: LeftOutError) -> int:
        """The others go on without this hospital: catch up with them, and ask to be in the next round. Its number."""
        self.links.set_phase("joining")
        number = self.joining.catch_up(left_out)
        if number > 0:
            checkpoint(self.peer, site_directory(self.config), number - 1)
        return number

    def _leave(self, number: int) -> None:
        """Keep the model of the last block, and tell the others that they go on without this hospital.

        Whoever of them lacks that block is given it. That none of them is there any more is no reason to stay.
        """
        hospital, common = self.peer.hospital, self.peer.common
        path = site_directory(self.config) / MODEL_FILE
        save_model(path, hospital.model, self.config, common.normalisation, None)
        self.links.set_phase("leaving")
        self.links.stay_for(())  # others relay for those that need it
        try:
            self.attendance.agree(
                Standing(number, digest_of_common(common), common.weight_total, leaves=True), 0, Reason()
            )
        except (PeerLostError, SumLostError, ProtocolError, QuorumError) as error:
            log.warning("%s: the others have not said that they go on without this hospital", error)
        log.info("%s leaves after round %d", self.links.name, number - 1)

    def _round(self, number: int, before: KeptState) -> None:
        """A round, under as many views as it takes until all have signed it; then it is kept."""
        began = time.monotonic()
        self.giving.before(number, before.common)
        self.results, self.attendance.complete = [Result()], None
        state, view, reason = digest_of_common(self.peer.common), 0, Reason()
        while True:
            self.links.set_phase(f"round {number} attendance")
            last = self.results[-1]
            standing = Standing(number, state, before.common.weight_total, last.made, self._exactly_opened(last))
            proposal = self.attendance.agree(standing, view, reason)
            if proposal is None:
                block = self.ledger.blocks[-1]
                more = block.kind == "end" and number <= self.config.training.rounds
                if block.members is not None or more:
                    self.attendance.members = block.parties
                    continue
                self._go_back_to(block, number)
                break
            view = proposal.plan.attempt
            try:
                self._follow(proposal, before)
                break
            except LeftOutError as error:
                self.attendance.void(number, view, Reason(error.what))  # who counts on this hospital hears that in time
                raise
            except (PeerLostError, ProtocolError, QuorumError) as error:
                # Too few in one sum is a lost sum: whether enough hospitals are there, `agree` finds by who is linked.
                lost = lost_with(error)
                if isinstance(error, ProtocolError) and not isinstance(error, SumLostError) and not lost:
                    raise  # nobody can tell who deviates
                log.warning("%s; round %d goes on under the next view", error, number)
                reason = Reason(error.what, lost)
                self.attendance.void(number, view, reason)
                view += 1
        self.attendance.members = self.ledger.blocks[-1].parties
        log.info("round %d took %.1f s", number, time.monotonic() - began)

    def _exactly_opened(self, last: Result) -> tuple[str, ...]:
        """Without privacy, among whom sums of this round were opened, or may have been, also before this start."""
        if self.config.privacy.mechanism != "none":
            return ()
        recorded = {name for opening in self.ledger.pending for name in opening.among}
        return tuple(sorted({*recorded, *(last.hospitals if last.made else ())}))

    def _follow(self, proposal: Proposal, before: KeptState) -> None:
        """What a plan says: the sums of the round, unless all of its hospitals have made them, and the signatures.

        A block that was complete before is finished first; then that is all, unless it was one that says who the parties are.
        """
        plan, number = proposal.plan, proposal.plan.number
        begun = self.attendance.signing(*plan.round_of, "begun")
        proposals, confirmed = self.attendance.proposals, self._confirmed
        settling = Settling(begun, proposal.present, self.certificates, proposals, confirmed)
        self.links.set_phase(f"round {number} reveal ledger")
        complete = settling.completed(self.attendance.complete, self.ledger)
        if complete is not None:
            self._finish(plan, complete)
            if complete.members is None:
                return
        elif self._newly_certified(plan.hospitals) or self._configured_otherwise:
            self._introduce(proposal)
        settling.settle(self.ledger)
        self.begun_before = bool(self.ledger.pending) and not plan.normalised
        if plan.normalised:
            self._keep_signed()
            self.peer.common.choice = copy.deepcopy(before.common.choice)  # without a figure that some may have lost
            self.results.append(replace(self.results[-1], hospitals=plan.hospitals, drafted=None, state=None))
        else:
            self._go_back(before)
            rules = replace(self.rules, opener=proposal.proposer)
            self._make(PeerRound(self.peer, self.domain, self.ledger, rules, plan, self.notify), self.results[-1])
        self.links.set_phase(f"round {number} signatures")
        self._sign(proposal, self.results[-1])

    @property
    def _confirmed(self) -> Mapping[str, Opening] | None:
        """The openings that this hospital has confirmed, by transcript; `None` before the first block of a start that goes on
        from an earlier one, or that was given what it goes on from."""
        is_first = self.config.site.resume and len(self.ledger.blocks) == self.blocks_before
        return None if is_first or not self.attendance.recalls else self.domain.confirmed

    def _keep_signed(self) -> None:
        """What was signed of this round before is kept, with its state, in case that a quorum has it complete."""
        signed = [result for result in self.results if result.drafted is not None and result.state is None]
        state = KeptState.of(self.peer) if signed else None
        for result in signed:
            result.state = state

    def _go_back(self, before: KeptState) -> None:
        """Make the round anew."""
        self._keep_signed()
        before.restore(self.peer)
        self.results.append(Result())

    def _finish(self, plan: RoundPlan, complete: Block) -> None:
        """Keep a block that was complete under an earlier view, when a quorum has it."""
        if self.links.name not in complete.parties:
            raise LeftOutError(self.links.name, complete.about)
        if complete.members is None:
            self._go_back_to(complete, plan.number)
        signers = self._signers(plan, complete.parties, "finish")
        present = [name for name in complete.parties if name in plan.hospitals and name != self.links.name]
        finished = self.attendance.agreeing.finish_together(plan.round_of, complete, present)
        if len(finished.signed) >= self.rules.smallest:
            self.attendance.complete = finished
        signers.keep(complete, present)
        self.attendance.complete = None
        self.attendance.kept(complete)
        if complete.members is not None and not set(plan.hospitals) <= set(complete.parties):
            raise SumLostError("fewer hospitals signed who takes part", "those go on")

    def _go_back_to(self, block: Block, number: int) -> None:
        """Take the state of the result of round `number` that a block is about, which may be that of an earlier start.

        Raises `LeftOutError` where this hospital has not made it.
        """
        for result in reversed(self.results):
            if result.drafted is not None and result.drafted.content_digest() == block.content_digest():
                if result.state is not None:
                    result.state.restore(self.peer)
                write_down(self.peer, number, result)
                return
        # Signed in an earlier start, which has kept what it takes.
        out, is_in = site_directory(self.config), self.config.site.resume and self.links.name in block.parties
        if is_in and block.kind == "end" and values_of_end(self.peer.hospital) == without_record(block.values):
            self._save_model()
        elif is_in and block.kind != "end":
            resume(self.peer, out, self.ledger)
        else:
            raise LeftOutError(self.links.name, f"{block.about}, which it has not signed")

    def _make(self, made: PeerRound, result: Result) -> None:
        """The sums of a round."""
        number, hospital, began = made.plan.number, self.peer.hospital, time.monotonic()
        result.hospitals, result.opened, result.own, result.made = made.plan.hospitals, {}, None, ""
        figures, said, seconds = dict[str, Any](), dict[str, Any](), {"train": 0.0, "aggregate": 0.0}
        if number == 0:
            result.hospitals = made.prepare()
        elif number <= self.config.training.rounds:
            result.hospitals, figures, seconds = made.train()
            result.refused = values_of_refused(made.refused)
        elif number == self.config.last_round:
            result.hospitals, said = made.conclude()
        result.made = digest_of_common(self.peer.common)
        if number > self.config.last_round:
            return
        evaluated = time.monotonic()
        own, opened = made.evaluate(result.hospitals)
        seconds["evaluate"] = time.monotonic() - evaluated
        result.seconds = time.monotonic() - began
        result.opened = opened_json(opened) | said | made.of_groups
        if number:
            result.own = hospital.metrics(number, own, seconds) | figures

    @property
    def _configured_otherwise(self) -> bool:
        """Whether the parties signed another configuration last: the run was given more rounds."""
        signed = next((block.members for block in reversed(self.ledger.blocks) if block.members is not None), None)
        return signed is not None and signed.configuration != self.config.digest()

    def _newly_certified(self, hospitals: tuple[str, ...]) -> list[str]:
        """Those by whose certificate no block of this ledger counts yet."""
        known = self.ledger.chain.certificates
        return [name for name in hospitals if known.get(name) != self.certificates[name]]

    def _introduce(self, proposal: Proposal) -> None:
        """The first block, one before the round that somebody joins in, and the first after a run was given more rounds: all sign
        who they are, and with which configuration."""
        config, ledger, plan, hospitals = self.config, self.ledger, proposal.plan, proposal.plan.hospitals
        certificates = {name: pem(self.certificates[name]).decode("ascii") for name in hospitals}
        quorum, authority = config.federation.quorum_size, fingerprint(ledger.authority)
        members = Members(config.federation.session, config.digest(), authority, certificates, quorum)
        kind, about = (
            ("resume", f"the hospitals of round {plan.number}") if ledger.blocks else ("start", "the run begins")
        )
        signers = self._signers(plan, hospitals, "start")
        require_allowed_members((self.certificates[name] for name in hospitals), config)
        about += _again(plan)
        self._signed(plan, signers, kind, about, proposal.told(self.attendance.members), members)

    def _sign(self, proposal: Proposal, result: Result) -> None:
        """The block of a round, or the last one of the run; the model is written before that."""
        plan, config, common, ledger = proposal.plan, self.config, self.peer.common, self.ledger
        number = plan.number
        signers = self._signers(plan, result.hospitals, "block")
        if number > config.last_round:
            self._save_model()
            kind, about, values = "end", "the run is complete", values_of_end(self.peer.hospital)
        else:
            complete = all({*opening.among, *opening.to} <= set(result.hospitals) for opening in ledger.pending)
            kind = "openings" if complete and not self.begun_before else "abandoned"
            about = f"round {number}"
            values = {"global model": common.digests.parameters, **result.refused}
            if number in common.choice.figures:
                values["validation"] = figure_digest(common.choice.figures[number])
            if common.digests.calibration:
                values["calibration"] = common.digests.calibration
            write_down(self.peer, number, result)
        try:
            self._signed(
                plan, signers, kind, f"{about}{_again(plan)}", {**values, **proposal.told(self.attendance.members)}
            )
        finally:
            result.drafted = signers.drafted

    def _save_model(self) -> None:
        common = self.peer.common
        path = site_directory(self.config) / MODEL_FILE
        save_model(path, self.peer.hospital.model, self.config, common.normalisation, common.calibration)

    def _signed(
        self,
        plan: RoundPlan,
        signers: PeerSigners,
        kind: str,
        about: str,
        values: dict[str, str],
        members: Members | None = None,
    ) -> None:
        """Have a block signed; where it is complete and cannot be kept, it is finished under a later view."""
        try:
            self.attendance.kept(signers.sign(kind, about, values, members))
        except (PeerLostError, ProtocolError):
            if signers.complete is not None:
                self.attendance.complete = Complete(plan.attempt, signers.complete)
            raise
        finally:
            signers.links.end_scope()

    def _signers(self, plan: RoundPlan, hospitals: tuple[str, ...], what: str) -> PeerSigners:
        links = self.attendance.signing(plan.number, plan.attempt, what)
        return PeerSigners(self.ledger, links, hospitals, self.rules.smallest, self.certificates)


def _again(plan: RoundPlan) -> str:
    """Under which view a block is made, if not the first, as its text ends (`peer_proposal.Complete.made_under`)."""
    return f" ({plan.attempt})" if plan.attempt else ""
