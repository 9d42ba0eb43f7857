"""A hospital that asks to take part, gives to one that asks, or leaves, and deviates: it gets no model that is not for it, nobody
goes on from what it alone has, and nobody is thrown out or kept waiting by it.

Each of these got something, threw an honest hospital out or ended the run, before something was mended. Parties are threads in
virtual time, as in `test_peer_membership`, unless a test says otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation.signed_words import Subject
from mpc_fl.audit.peer_signing import PeerSigners
from mpc_fl.audit.reveal_ledger import Block, to_json
from mpc_fl.config.config import Config
from mpc_fl.config.deployment import is_address
from mpc_fl.crypto.authority import Authority, make_local_identities
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import MpcFlError, PeerLostError, SumLostError
from mpc_fl.federation import choice, peer_announcements, peer_attendance, peer_joining
from mpc_fl.federation.checkpoint import Checkpoint, checkpoint_name, load_checkpoint, save_checkpoint
from mpc_fl.federation.peer_admission import Admission
from mpc_fl.federation.peer_announcements import Announced, Announcements
from mpc_fl.federation.peer_asking import Asking
from mpc_fl.federation.peer_attendance import PeerAttendance
from mpc_fl.federation.peer_joining import Giving
from mpc_fl.federation.peer_presence import Presence
from mpc_fl.federation.peer_proposal import Proposals
from mpc_fl.links import outgoing
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.links.links import Links
from mpc_fl.links.settings import Timeouts, Tolerance
from tests.attacks.test_peer_membership import LATE, NEWCOMER, with_a_newcomer
from tests.attacks.test_peer_rounds import without
from tests.attacks.test_peer_words import DEVIATES, gives_up_signing, honest
from tests.federation.test_peer_membership import FOUR, ROUNDS, require_joined, stopped
from tests.support.harness import free_ports, local_links
from tests.support.peer_rounds import among_peers, names, require_sound
from tests.support.peer_sums import only_at
from tests.support.training_in_memory import KILLED, SETTINGS, Sleeper, Training


def given_to_newcomers(run: Training) -> list[tuple[str, str]]:
    """Whoever sent a state, and under which tag."""
    return [(sender, tag) for sender, tag in run.sent if tag.startswith("joining ") and tag.endswith("/state")]


def test_no_model_for_one_that_a_member_does_not_admit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two of three votes it asks each of them for the model, by its own program."""
    run = with_a_newcomer(tmp_path, monkeypatch)
    only_at(monkeypatch, "hospital-2", Admission, "vote", lambda *_: None)
    run.run(late=LATE)
    require_sound(run, names(3))
    assert not given_to_newcomers(run)
    assert any("admitted hospital-3 with 2 votes, and it needs 3" in line for line in run.log)


def test_no_model_for_one_that_the_rule_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_a_newcomer(tmp_path, monkeypatch, hospitals=5, quorum=3, admission=["hospital-4"])
    run.placed.pop("hospital-4")
    run.run(late=LATE)
    require_sound(run, names(3))
    assert run.said[NEWCOMER] != "finished"
    assert not given_to_newcomers(run)


# ---- a block that one alone has complete ---------------------------------------------------------------------------------


def withholds(monkeypatch: pytest.MonkeyPatch, who: str) -> list[Block]:
    """It takes all signatures of round 1 under view 0, and gives its own to nobody: it alone has the block, and denies it."""
    complete = list[Block]()

    def say(original: Any, self: PeerSigners, to: Any, tag: str, value: Any) -> None:
        if self.drafted is None or self.drafted.about != "round 1":
            original(self, to, tag, value)
        elif tag == "complete":
            assert self.complete is not None
            complete.append(self.complete)
            self.complete = None
            raise SumLostError("nothing that was lost", "")

    only_at(monkeypatch, who, PeerSigners, "_say", say)
    return complete


def test_a_newcomer_is_given_a_block_that_one_alone_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept that block for good, and named all others for giving another ledger."""
    run = with_a_newcomer(tmp_path, monkeypatch)
    complete = withholds(monkeypatch, "hospital-0")

    def give(original: Any, self: Giving, *rest: Any) -> None:
        blocks = self.ledger.blocks
        self.ledger.blocks = [*blocks[: complete[0].number], complete[0]]
        try:
            original(self, *rest)
        finally:
            self.ledger.blocks = blocks

    only_at(monkeypatch, "hospital-0", Giving, "give", give)
    run.run(late={NEWCOMER: "transcript update 2 0"})
    assert complete
    require_joined(run, NEWCOMER, names(3))
    assert any(
        "hospital-0 gave what cannot be: hospital-0 gave another ledger than a quorum has" in line for line in run.log
    )
    assert not [line for line in run.log if "gave what cannot be" in line and not line.startswith("hospital-0")]


def test_a_member_that_was_left_out_is_given_a_block_that_one_alone_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hospital-2 proposes view 1 without hospital-4, and gives it the block of view 0, which nobody else goes on from."""
    run = among_peers(tmp_path, monkeypatch, training=ROUNDS)
    complete = withholds(monkeypatch, "hospital-2")

    def say(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        if subject.word != "proposal" or (values["number"], values["view"]) != (1, 1):
            return original(domain, links, to, subject, values)
        signed = original(domain, links, to, subject, without(values, "hospital-4"))
        links.send_object("hospital-4", "word", {"word": "block", "block": to_json(complete[0])})
        return signed

    only_at(monkeypatch, "hospital-2", peer_attendance, "say_signed", say)
    run.run()
    assert complete
    require_joined(run, "hospital-4", ["hospital-0", "hospital-1", "hospital-3"])


# ---- one that was in an exact sum, and is there no more ------------------------------------------------------------------


def says_of_round_1(monkeypatch: pytest.MonkeyPatch, who: str, change: Callable[[Presence], Presence]) -> None:
    """From the second view on."""

    def present(original: Any, *arguments: Any) -> Presence:
        said: Presence = original(*arguments)
        return change(said) if said.number == 1 and said.view else said

    only_at(monkeypatch, who, Proposals, "own_presence", present)


def test_one_leaves_in_the_middle_of_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has had the sum of round 1 opened, and gives up its signatures. Nobody signed to make the sum anew without it, though it
    said that it leaves: each proposer was named, and the run ended."""
    run = among_peers(tmp_path, monkeypatch)
    gives_up_signing(monkeypatch)
    says_of_round_1(monkeypatch, DEVIATES, lambda said: replace(said, leaves=True, made=""))
    # One of the others has lost it, so that it has to be made anew.
    says_of_round_1(monkeypatch, "hospital-0", lambda said: replace(said, made=""))
    run.run()
    require_sound(run, honest())
    assert not [line for line in run.log if "would make a sum of round 1 anew" in line]


def test_one_says_nothing_after_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays linked, and says nothing more under the next view."""

    def silent(original: Any, self: PeerAttendance, standing: Any, view: int, *rest: Any) -> None:
        if standing.number == 1 and view:
            run.clock.wait(run.never, float("inf"))
        original(self, standing, view, *rest)

    run = among_peers(tmp_path, monkeypatch)
    gives_up_signing(monkeypatch)
    says_of_round_1(monkeypatch, "hospital-0", lambda said: replace(said, made=""))
    only_at(monkeypatch, DEVIATES, PeerAttendance, "_say_present", silent)
    run.run(silent=(DEVIATES,))
    require_sound(run, honest())
    assert not [line for line in run.log if "would make a sum of round 1 anew" in line]


def leaves_out_hospital_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-1, which proposes round 1."""

    def say(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        if subject.word == "proposal" and (values["number"], values["view"]) == (1, 0):
            values = without(values, "hospital-3")
        return original(domain, links, to, subject, values)

    only_at(monkeypatch, "hospital-1", peer_attendance, "say_signed", say)


def test_an_exact_sum_is_not_made_anew_without_somebody_after_all_have_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All knew the sum of round 1 when they stopped, and not any more that they did when they went on with --resume."""
    run = among_peers(tmp_path, monkeypatch, 4, evaluation={"every": 1})
    run.run(*(Sleeper(name, "transcript evaluation 1 0", KILLED) for name in ("hospital-2", "hospital-3")))
    assert "finished" not in set(run.said.values()), run.said
    run.placed = {name: config.with_values(site={"resume": True}) for name, config in run.placed.items()}
    run.start_anew()
    run.sent.clear()
    leaves_out_hospital_3(monkeypatch)
    run.run()
    require_sound(run, honest(4, "hospital-1"))
    assert any("hospital-1 would make a sum of round 1 anew without hospital-3" in line for line in run.log)
    assert not [sender for sender, tag in run.sent if tag.startswith("transcript update 1 0")]


def test_one_that_is_needed_is_left_out_after_all_have_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All had signed a block and may have forgotten, so all must be there; whoever was asked to go on without one ended the run."""
    run = stopped(tmp_path, monkeypatch, "block 1 0/signed")
    leaves_out_hospital_3(monkeypatch)
    run.run()
    require_sound(run, honest(4, "hospital-1"))
    assert any("hospital-1 left out hospital-3, which is there and needed" in line for line in run.log)


# ---- two certificates ----------------------------------------------------------------------------------------------------


def certified_twice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Training, bytes]:
    """A run of five, and another certificate of hospital-3 by the same authority."""
    authorities, issue = list[Authority](), Authority.issue

    def noted(authority: Authority, *arguments: Any, **named: Any) -> Identity:
        authorities.append(authority)
        return issue(authority, *arguments, **named)

    monkeypatch.setattr(Authority, "issue", noted)
    run = among_peers(directory, monkeypatch)
    return run, issue(authorities[0], DEVIATES).certificate


def test_two_certificates_for_two_hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hospital-1 could check nothing that hospital-3 said, took whoever passed that on for a liar, and ended the run of all."""
    run, another = certified_twice(tmp_path, monkeypatch)

    def show(original: Any, links: Any, receiver: str, tag: str, value: Any) -> None:
        if (receiver, tag) == ("hospital-1", "certificate"):
            value = {"certificate": another.decode("ascii")}
        original(links, receiver, tag, value)

    only_at(monkeypatch, DEVIATES, Links, "send_object", show)
    run.run()
    require_sound(run, honest())
    assert not [line for line in run.log if "what it did not sign" in line]


def test_another_certificate_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its word for round 1, before that is passed on: whoever passed it on seemed to lie."""
    run, another = certified_twice(tmp_path, monkeypatch)

    def say(original: Any, self: PeerAttendance, standing: Any, *rest: Any) -> None:
        original(self, standing, *rest)
        for name in honest() if standing.number == 1 else ():
            self.domain.links.send_object(name, "certificate", {"certificate": another.decode("ascii")})

    only_at(monkeypatch, DEVIATES, PeerAttendance, "_say_present", say)
    run.run()
    require_sound(run, names(5))
    assert not [line for line in run.log if "what it did not sign" in line]
    assert any("hospital-3 shows another certificate than it began with" in line for line in run.log)


# ---- what a newcomer is given --------------------------------------------------------------------------------------------


def test_a_member_gives_another_figure_to_choose_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else of the state is right. The newcomer would have chosen another model than all others in the end. That the candidate
    is of an earlier round than the last, as here, made what honest ones gave seem false."""
    run = among_peers(
        tmp_path,
        monkeypatch,
        4,
        federation={**FOUR, "evaluate_incomplete": True},  # or nothing is validated before all are there
        training=ROUNDS,
        data={"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 12}, "validation_fraction": 0.3},
        evaluation={"choose": "best"},
    )

    def given(original: Any, common: Any, number: int) -> torch.Tensor:
        assert common.choice.figures
        figures = dict.fromkeys(common.choice.figures, 0.99)
        state: torch.Tensor = original(replace(common, choice=replace(common.choice, figures=figures)), number)
        return state

    monkeypatch.setattr(choice, "best_round", min)  # the first one, at all of them
    only_at(monkeypatch, "hospital-0", peer_joining, "given_form", given)
    run.run(late={NEWCOMER: "transcript update 2 0"})
    require_joined(run, NEWCOMER, names(3))
    assert any("another state of the run was given than the hospitals have" in line for line in run.log)


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def another_optimizer(tensors: dict[str, torch.Tensor], _facts: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(("optimizer", "average"))]:
        del tensors[name]
    tensors["optimizer.nothing"] = tensors["average.nothing"] = torch.zeros(3)


FALSE: dict[str, Change] = {
    "another optimizer": another_optimizer,
    "a normalisation of one number": lambda tensors, _: tensors.update(normalisation=torch.zeros(1)),
    "a normalisation of other numbers": lambda tensors, _: tensors.update(normalisation=torch.zeros(2, 7, 9)),
    "a calibration that is none": lambda tensors, _: tensors.update(calibration=torch.zeros(0, dtype=torch.int8)),
    "figures of nothing": lambda tensors, _: tensors.update({"choice.figures": torch.zeros(2, 2, dtype=torch.bool)}),
    "figures that are none": lambda tensors, _: tensors.update(
        {"choice.figures": torch.full((2, 2), float("nan"), dtype=torch.float64)}
    ),
    "a candidate alone": lambda tensors, _: tensors.update({"choice.round": torch.tensor([1])}),
    "no patients": lambda _, facts: facts.clear(),
    "patients without end": lambda _, facts: facts.update(patients=10**300),
    "none at all": lambda _, facts: facts.update(patients=0),
    "a weight of another kind": lambda _, facts: facts.update({"weight total": True}),
    "counted by nobody": lambda _, facts: facts.update(counted=[]),
}


def changed(given: torch.Tensor, number: int, config: Config, change: Change) -> torch.Tensor:
    """A state that whoever gives it has changed before it was written, with its digest."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / checkpoint_name(number)
        path.write_bytes(bytes(given.tolist()))
        saved = load_checkpoint(Path(directory), config)
        assert saved is not None
        tensors, facts = dict(saved.tensors), dict(saved.facts)
        change(tensors, facts)
        save_checkpoint(Path(directory), Checkpoint(number, tensors, facts), config)
        return torch.tensor(list(path.read_bytes()), dtype=torch.uint8)


def test_states_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it holds, whoever is given it says in one line that it is not that, and takes another one."""
    tried, run = dict[str, str](), with_a_newcomer(tmp_path, monkeypatch)

    def take(original: Any, peer: Any, given: torch.Tensor, ledger: Any, number: int, state: str) -> None:
        false = {what: changed(given, number, peer.common.config, change) for what, change in FALSE.items()}
        false |= {"nothing": given[:0], "half of it": given[: len(given) // 2], "zeros": torch.zeros_like(given)}
        for what, each in false.items():
            try:
                original(peer, each, ledger, number, state)
                tried[what] = "taken"
            except MpcFlError:
                tried[what] = "refused"
            except Exception as error:  # noqa: BLE001 - shown by the test
                tried[what] = repr(error)
        original(peer, given, ledger, number, state)

    only_at(monkeypatch, NEWCOMER, peer_joining, "take_given", take)
    run.run(late=LATE)
    assert len(tried) == len(FALSE) + 3 and set(tried.values()) == {"refused"}, tried
    require_joined(run, NEWCOMER, names(3))


# ---- one that keeps others waiting, or out -------------------------------------------------------------------------------


def test_one_that_starts_again_and_again_is_not_waited_for_each_time() -> None:
    """It asks, and never says that it is there: each start of it had who proposes wait three times more."""
    network = InMemoryNetwork(names(2), Agreement("test", "digest", "train"), Timeouts(60.0, 60.0))
    tolerance = Tolerance(frozenset(names(2)), True, later=frozenset(names(2)))
    waited = list[int]()
    nothing: Any = None
    with network.links("hospital-0", tolerance) as links:
        asking = Asking(links, Subject("", ""), nothing, nothing, nothing)
        for number in range(200):
            network.drop("hospital-1")
            network.links("hospital-1", tolerance).__enter__()
            asking._starts["hospital-1"] = links.key_fingerprint("hospital-1")
            newcomers = asking.awaited((), number)
            asking.were_waited_for(newcomers, number)
            waited += [number] if newcomers else []
    assert waited == [0, 1, 2, 4, 8, 16, 32, 64, 128]


def test_one_that_is_left_out_again_and_again_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever hospital-1 proposes; it gave up for good after some times, though it took part in all other rounds."""
    run = among_peers(tmp_path, monkeypatch, training={**SETTINGS["training"], "rounds": 12})
    monkeypatch.setattr(peer_joining, "_MOST_RETURNS", 1)
    left_out = list[int]()

    def say(original: Any, domain: Any, links: Any, to: Any, subject: Any, values: Any) -> Any:
        if subject.word == "proposal" and values["number"] in range(1, 11) and "hospital-4" in values["hospitals"]:
            left_out.append(values["number"])
            values = without(values, "hospital-4")
        return original(domain, links, to, subject, values)

    only_at(monkeypatch, "hospital-1", peer_attendance, "say_signed", say)
    run.run()
    assert len(left_out) >= 2
    require_joined(run, "hospital-4", ["hospital-0", "hospital-2", "hospital-3"])


def test_one_that_reads_nothing_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends it something waited for a whole answer with each word, and so was late for all others."""
    monkeypatch.setattr(outgoing, "_LONGEST_STALL", 0.2)
    make_local_identities(names(2), {name: tmp_path / name for name in names(2)})
    ports = dict(zip(names(2), free_ports(2), strict=True))
    links = local_links("hospital-0", names(2), ports, tmp_path, tolerated=["hospital-1"])
    peer = links._outgoing.peers["hospital-1"]
    peer.conversation = Conversation(lambda chunk: True, lambda failure: None)
    links._mailboxes.connect("hospital-1")
    with pytest.raises(PeerLostError, match="hospital-1 takes no data"):
        for _ in range(10):
            links.send_object("hospital-1", "word", {})
    assert not links.alive("hospital-1") and peer.conversation.over
    monkeypatch.setattr(outgoing, "_LONGEST_STALL", math.inf)
    with pytest.raises(PeerLostError, match="hospital-1 takes no data"):  # at once
        links.send_object("hospital-1", "word", {})


@pytest.mark.parametrize(
    "address",
    ["unix:/run/secret.sock:1", "dns://192.0.2.1/inside.example:443", "ipv4:192.0.2.1:1,192.0.2.2:1", "a b:1"],
)
def test_an_address_that_is_no_host(address: str) -> None:
    """A library could dial a socket of this machine, or ask whom a newcomer names for the address of another."""
    assert not is_address(address)
    assert all(map(is_address, ("hospital.example:47100", "192.0.2.1:1", "[2001:db8::1]:65535")))


def test_announcements_without_end(tmp_path: Path) -> None:
    """Each newer by a little: every one was passed on to all others, and remembered for good."""
    make_local_identities(names(2), {name: tmp_path / name for name in names(2)})
    own = {name: Announced(load_identity(tmp_path / name, name), "session", ("hospital-1",)) for name in names(2)}
    network = InMemoryNetwork(names(3), Agreement("test", "digest", "train"), Timeouts(60.0, 60.0))
    tolerance, passed_on = Tolerance(frozenset(names(3)), True, later=frozenset(names(3))), list[str]()
    network.watch(lambda sender, receiver, _: passed_on.append(receiver) if sender == "hospital-0" else None)
    start = peer_announcements.now()
    with contextlib.ExitStack() as stack:
        links = {name: stack.enter_context(network.links(name, tolerance)) for name in names(3)}
        announcements = Announcements(links["hospital-0"], own["hospital-0"], None)
        passed_on.clear()
        for number in range(40):
            since = start + datetime.timedelta(seconds=number)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(peer_announcements, "now", lambda since=since: since)
                said = own["hospital-1"].made("x:1")
            links["hospital-1"].send_object("hospital-0", "announcement", asdict(said))
            announcements.exchange()
    assert passed_on == ["hospital-2"] * 4
    assert len(announcements._told) == 1
