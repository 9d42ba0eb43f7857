"""Hospitals that fail in the middle of a run: left out, back again at the next round, or too many for the quorum.

Every party is a real process that runs its real program; the victim kills itself with SIGKILL on entering a phase, so the
fault always strikes where the test says. Nothing here depends on how long anything takes, within the deadlines.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509

from mpc_fl.aggregation.norm_check import NormCheck
from mpc_fl.audit.ledger_audit import Copy, verify_copies
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.record_audit import RecordCopy, verify_records
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.config.config import Config, parse_config, party_names
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.federation.checkpoint import load_checkpoint
from mpc_fl.files import read_json_lines
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_model, load_normalisation
from mpc_fl.learning.models.parameters import shared_coordinates
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from tests.support.deviating import run_and_report
from tests.support.harness import SPAWN
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {
        "rounds": ROUNDS,
        "local_steps": 2,
        "batch_size": 16,
        "per_sample_gradients": "vmap",
        "sampling_seed": 5,
    },
    "privacy": {"mechanism": "none"},
    "evaluation": {"every": 1},
    "federation": {"quorum": 2},
    "runtime": {"connect_timeout": 30.0, "receive_timeout": 60.0},
}
DISTRIBUTED = {"mechanism": "distributed", "noise_multiplier": 4.0, "delta": 1e-3, "epsilon": 20.0}


def _party(name: str, values: dict[str, Any], deaths: list[str], results: Any, awaited: str | None) -> None:
    """One party as its site runs it; it dies by SIGKILL on entering the first phase of `deaths` that it comes to.

    An aggregator waits in round 4 until `awaited` has announced itself again.
    """
    from mpc_fl.apps.runs.party_process import set_up_log
    from mpc_fl.links.links import Links

    enter_phase = Links.set_phase

    def die_in_phase(links: Links, entered: str) -> None:
        enter_phase(links, entered)
        while awaited and links.name == "aggregator" and entered == "round 4 aggregation":
            if links.waiting(awaited, "present"):
                break
            links.await_change(0.1)
        if entered in deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if f"sleeps in {entered}" in deaths:
            time.sleep(3600.0)

    Links.set_phase = die_in_phase  # type: ignore[method-assign]
    if "round 1 signed" in deaths:
        die_once_round_1_is_signed()
    if "boosting" in deaths:
        boost_round_2()
    if "dies_in_check" in deaths:
        NormCheck.at_hospital = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    config = parse_config(values, name)
    set_up_log(config.site.log)
    run_and_report(name, config, results)


def die_once_round_1_is_signed() -> None:
    from mpc_fl.federation import hospital_program as hospital

    sign_round = hospital.sign_round

    def sign_and_die(ledger: Any, links: Any, rules: Any, about: str, held: Any) -> bool:
        signed = sign_round(ledger, links, rules, about, held)
        if about == "round 1":
            os.kill(os.getpid(), signal.SIGKILL)
        return signed

    hospital.sign_round = sign_and_die


def boost_round_2() -> None:
    from mpc_fl.federation import local_update as federation

    train_locally = federation.train_locally

    def boosted(*arguments: Any, round_number: int, **named: Any) -> Any:
        local = train_locally(*arguments, round_number=round_number, **named)
        # What the norm bound is about: an honest update here is far below it, ten times a long one far above.
        unit = local.update / local.update.norm()
        return dataclasses.replace(local, update=unit * (10.0 if round_number == 2 else 0.9))

    federation.train_locally = boosted


class Site:
    """All parties of one run on this machine."""

    def __init__(self, directory: Path, **changes: dict[str, Any]) -> None:
        from mpc_fl.apps.runs.local_parties import place_parties

        values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
        self.config: Config = parse_config(values, "test")
        self.directory = directory
        self.placed = place_parties(self.config, directory)
        self.results = SPAWN.Queue()
        self.processes: dict[str, Any] = {}

    def start(self, name: str, resume: bool = False, deaths: tuple[str, ...] = (), awaited: str | None = None) -> None:
        values = self.placed[name].with_values(site={"resume": resume}).model_dump(mode="json")
        process = SPAWN.Process(target=_party, args=(name, values, list(deaths), self.results, awaited), name=name)
        process.start()
        self.processes[name] = process

    def start_all(self, resume: bool = False, awaited: str | None = None, **deaths: str) -> None:
        for name in party_names(self.config):
            fatal = tuple(phase for key, phase in deaths.items() if key.replace("_", "-") == name)
            fatal += tuple(key for key, victim in deaths.items() if victim == name)
            self.start(name, resume, fatal, awaited)

    def await_death(self, name: str) -> None:
        self.processes[name].join(timeout=120)
        assert self.processes[name].exitcode == -signal.SIGKILL, "the victim never came to that phase"

    def await_words(self, count: int) -> dict[str, str]:
        words = dict(self.results.get(timeout=150) for _ in range(count))
        for name in words:
            self.processes[name].join(timeout=30)
        return words

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()

    def party(self, name: str) -> Path:
        return self.directory / "parties" / name

    @property
    def rounds(self) -> dict[int, dict[str, Any]]:
        path = self.party("aggregator") / "metrics.jsonl"
        return {line["round"]: line for line in read_json_lines(path)} if path.exists() else {}

    def parameters(self, name: str) -> torch.Tensor:
        model = load_model(self.party(name) / "model.safetensors", self.config)
        return torch.cat([value.reshape(-1) for value in model.state_dict().values()])

    def verify(self, *names: str) -> None:
        """The reveal ledger is complete and signed, the same at all these parties."""
        root = x509.load_pem_x509_certificate((self.party("aggregator") / "identity" / ROOT_FILE).read_bytes())
        copies = [Copy(name, name, (self.party(name) / LEDGER_FILE).read_bytes()) for name in names]
        assert len({copy.content for copy in copies}) == 1
        others = [name for name in ALL if name not in names and (self.party(name) / LEDGER_FILE).exists()]
        lost = [Copy(name, name, (self.party(name) / LEDGER_FILE).read_bytes()) for name in others]
        verdict = verify_copies([*copies, *lost], root, datetime.datetime.now(datetime.UTC))
        assert not verdict.findings, verdict.findings
        records = [
            RecordCopy(name, name, (self.party(name) / OPENINGS_FILE).read_bytes())
            for name in (*ALL, "aggregator")
            if (self.party(name) / OPENINGS_FILE).exists()  # who was lost before it knew of anything has none
        ]
        assert not any(verify_records(records, verdict.reference)), "what was begun is signed, and the other way about"


ALL = ("hospital-0", "hospital-1", "hospital-2")


@pytest.mark.parametrize(
    ("phase", "first_without"),
    [("data", 0), ("round 2 training", 2), pytest.param("round 2 aggregation", 2, marks=pytest.mark.slow),
     *[pytest.param(phase, 0, marks=pytest.mark.slow) for phase in ("distribution", "reveal ledger", "preparation")],
     pytest.param("round 2 signatures", 3, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_run_goes_on_without_a_lost_hospital(phase: str, first_without: int, tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.start_all(hospital_1=phase)
        site.await_death("hospital-1")
        assert set(site.await_words(3).values()) == {"finished"}
        took_part = {number: tuple(line["hospitals"]) for number, line in site.rounds.items()}
        left = ("hospital-0", "hospital-2")
        assert took_part == {n: ALL if n < first_without else left for n in range(ROUNDS + 1)}
        # Counts over two hospitals would show the third one's; they stay closed.
        assert [line["evaluation"] is not None for line in site.rounds.values()][first_without:] == [
            False for _ in range(first_without, ROUNDS + 1)
        ]
        assert torch.equal(site.parameters("hospital-0"), site.parameters("aggregator"))
        site.verify("aggregator", "hospital-0", "hospital-2")


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "first_without"), [("round 3 training", 3), ("round 2 signatures", 3)])
def test_a_hospital_that_hangs_is_named_and_the_others_go_on(phase: str, first_without: int, tmp_path: Path) -> None:
    """Where exactly, and for how long: tests/federation/test_who_is_late.py. Here links are those of the network."""
    with Site(tmp_path, runtime={"connect_timeout": 60.0, "receive_timeout": 25.0}) as site:
        site.start_all(hospital_1=f"sleeps in {phase}")
        assert set(site.await_words(3).values()) == {"finished"}
        took_part = {number: tuple(line["hospitals"]) for number, line in site.rounds.items()}
        left = ("hospital-0", "hospital-2")
        assert took_part == {n: ALL if n < first_without else left for n in range(ROUNDS + 1)}
        logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
        assert set(re.findall(r"(\S+) is late", logs)) == {"hospital-1"}
        site.verify("aggregator", "hospital-0", "hospital-2")


@pytest.mark.slow
def test_a_run_begins_without_a_hospital_that_has_not_come(tmp_path: Path) -> None:
    """It comes when the first round is under way, and takes part from then on."""
    with Site(tmp_path, training={**SETTINGS["training"], "rounds": 5}) as site:
        for name in ("aggregator", "hospital-0", "hospital-2"):
            site.start(name, awaited="hospital-1")
        eventually(lambda: 1 in site.rounds, 120.0, "the others begin without it")
        site.start("hospital-1", resume=True)
        assert set(site.await_words(4).values()) == {"finished"}
        left = ("hospital-0", "hospital-2")
        assert {number: tuple(line["hospitals"]) for number, line in site.rounds.items()} == {
            **dict.fromkeys(range(5), left), 5: ALL
        }  # fmt: skip
        for name in ALL:
            assert torch.equal(site.parameters(name), site.parameters("aggregator"))
        site.verify("aggregator", *ALL)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"federation": {"quorum": 2, "dial_out_only": list(ALL)}}, marks=pytest.mark.slow)],
    ids=["direct links", "all hospitals dial out"],
)
def test_a_hospital_comes_back_at_a_later_round(changes: dict[str, Any], tmp_path: Path) -> None:
    with Site(tmp_path, training={**SETTINGS["training"], "rounds": 5}, **changes) as site:
        site.start_all(awaited="hospital-1", hospital_1="round 2 training")
        site.await_death("hospital-1")
        site.start("hospital-1", resume=True)
        assert set(site.await_words(4).values()) == {"finished"}
        took_part = {number: tuple(line["hospitals"]) for number, line in site.rounds.items()}
        left = ("hospital-0", "hospital-2")
        assert took_part == {0: ALL, 1: ALL, 2: left, 3: left, 4: left, 5: ALL}
        assert site.rounds[5]["evaluation"] is not None
        for name in ALL:
            assert torch.equal(site.parameters(name), site.parameters("aggregator"))
        site.verify("aggregator", *ALL)


def test_fewer_than_the_quorum_end_the_run_and_say_so(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.start_all(hospital_1="round 2 training", hospital_2="round 2 aggregation")
        site.await_death("hospital-1")
        site.await_death("hospital-2")
        words = site.await_words(2)
        assert "1 hospitals are left and the quorum is 2" in words["aggregator"], words
        assert all(site.processes[name].exitcode not in (0, None) for name in words)
        assert not (site.party("aggregator") / "model.safetensors").exists()
        assert max(site.rounds) == 1
        assert load_checkpoint(site.party("aggregator"), site.config).round == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("victim", "phase"),
    [("aggregator", "round 2 signatures"),
     *[pytest.param("aggregator", phase, marks=pytest.mark.slow)
       for phase in ("preparation", "round 0 evaluation", "round 2 aggregation", "round 2 evaluation", "reveal ledger")],
     *[pytest.param("hospital-1", phase, marks=pytest.mark.slow)
       for phase in ("round 1 signatures", "round 1 signed", "round 2 training", "round 3 aggregation")]],
)  # fmt: skip
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(victim: str, phase: str, tmp_path: Path) -> None:
    """With noise off and the sampling order fixed. All must be there: the loss of any party ends the run."""
    complete = {"federation": {"quorum": None}}
    with Site(tmp_path / "whole", **complete) as site:
        site.start_all()
        assert set(site.await_words(4).values()) == {"finished"}
        expected = site.parameters("aggregator")
    with Site(tmp_path / "killed", **complete) as site:
        site.start_all(**{victim.replace("-", "_"): phase})
        site.await_death(victim)
        assert all(victim in word for word in site.await_words(3).values())
        site.start_all(resume=True)
        assert site.await_words(4) == dict.fromkeys(party_names(site.config), "finished")
        for name in party_names(site.config):
            assert torch.equal(site.parameters(name), expected), name
        assert sorted(site.rounds) == list(range(ROUNDS + 1))
        for name in ALL:
            assert [line["round"] for line in read_json_lines(site.party(name) / "metrics.jsonl")] == [1, 2, 3]
        site.verify("aggregator", *ALL)


@pytest.mark.slow
def test_momentum_schedule_and_mean_go_on_where_they_were(tmp_path: Path) -> None:
    """A hospital's momentum of the rounds before is its own and in no message: it must be in its checkpoint."""
    recipe = {"keep_momentum": True, "schedule": "cosine", "warm_up": 0.3, "ema_decay": 0.6}
    changes = {"training": {**SETTINGS["training"], **recipe}, "federation": {"quorum": None}}
    with Site(tmp_path / "whole", **changes) as site:
        site.start_all()
        assert set(site.await_words(4).values()) == {"finished"}
        expected = site.parameters("aggregator")
    with Site(tmp_path / "killed", **changes) as site:
        site.start_all(hospital_1="round 3 aggregation")
        site.await_death("hospital-1")
        site.await_words(3)
        site.start_all(resume=True)
        assert set(site.await_words(4).values()) == {"finished"}
        for name in party_names(site.config):
            assert torch.equal(site.parameters(name), expected), name


def test_a_run_goes_on_from_the_round_before_a_damaged_checkpoint(tmp_path: Path) -> None:
    """One flipped bit of a parameter was another model, and every ledger verified."""
    complete = {"federation": {"quorum": None}}
    with Site(tmp_path / "whole", **complete) as site:
        site.start_all()
        assert set(site.await_words(4).values()) == {"finished"}
        expected = site.parameters("aggregator")
    with Site(tmp_path / "damaged", **complete) as site:
        site.start_all(aggregator="round 3 aggregation")
        site.await_death("aggregator")
        site.await_words(3)
        path = site.party("aggregator") / "checkpoint-2.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1  # the exponent of a parameter, float32
        path.write_bytes(content)
        site.start_all(resume=True)
        assert site.await_words(4) == dict.fromkeys(party_names(site.config), "finished")
        for name in party_names(site.config):
            assert torch.equal(site.parameters(name), expected), name
        assert sorted(site.rounds) == list(range(ROUNDS + 1))
        site.verify("aggregator", *ALL)


def test_own_layers_and_a_common_normalisation_survive_a_crash(tmp_path: Path) -> None:
    """FedBN and secure normalisation through whole runs; what is each hospital's own is never sent."""
    changes: dict[str, dict[str, Any]] = {
        "data": {**SETTINGS["data"], "image_size": 16, "normalise": "secure"},
        "model": {"architecture": "small_cnn", "normalisation": "group"},
        "training": {**SETTINGS["training"], "local_normalisation": True},
        "federation": {"quorum": None},
    }
    with Site(tmp_path / "whole", **changes) as site:
        site.start_all()
        assert set(site.await_words(4).values()) == {"finished"}
        expected = {name: site.parameters(name) for name in party_names(site.config)}
        found = load_normalisation(site.party("aggregator") / "model.safetensors", site.config)
        hospitals = [load_hospital(site.config, rank, "train") for rank in range(3)]
        patients = [data.inputs[rows].double() for data in hospitals for rows in data.records_of_patient]
        mean = torch.stack([images.mean() for images in patients]).mean()
        variance = torch.stack([(images - mean).square().mean() for images in patients]).mean()
        assert found is not None
        assert found.mean[0] == pytest.approx(float(mean), abs=1e-4)
        assert found.deviation[0] == pytest.approx(float(variance.sqrt()), abs=1e-4)
        shared = shared_coordinates(build_model(site.config, seed=0), True)
        assert 0 < int((~shared).sum()) < len(shared)
        for first, second in itertools.combinations(expected.values(), 2):
            assert torch.equal(first[shared], second[shared])
            assert not torch.equal(first[~shared], second[~shared])
    with Site(tmp_path / "killed", **changes) as site:
        site.start_all(hospital_1="round 2 training")
        site.await_death("hospital-1")
        site.await_words(3)
        site.start_all(resume=True)
        assert set(site.await_words(4).values()) == {"finished"}
        for name in party_names(site.config):
            assert torch.equal(site.parameters(name), expected[name]), name
            assert load_normalisation(site.party(name) / "model.safetensors", site.config) == found
        site.verify("aggregator", *ALL)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_privacy_ledger_that_forgot(tmp_path: Path) -> None:
    changes = {
        "privacy": {"mechanism": "local", "noise_multiplier": 2.0, "delta": 1e-3},
        "federation": {"quorum": None},
    }
    with Site(tmp_path, **changes) as site:
        ledger = PrivacyLedger(site.party("hospital-0") / "hospital-0-privacy.sqlite3", "hospital-0")
        site.start_all(aggregator="round 3 aggregation")
        site.await_death("aggregator")
        site.await_words(3)
        state = load_checkpoint(site.party("hospital-0"), site.config)
        assert state is not None and state.facts["privacy accountant"] == ledger.records()[:2]
        ledger.path.unlink()
        site.start_all(resume=True)
        words = site.await_words(4)
        assert "holds less than when the last checkpoint was written" in words["hospital-0"], words
        assert not (site.party("aggregator") / "model.safetensors").exists()


@pytest.mark.slow
def test_distributed_noise_with_a_lost_hospital(tmp_path: Path) -> None:
    with Site(tmp_path, privacy=DISTRIBUTED) as site:
        site.start_all(hospital_1="round 2 training")
        site.await_death("hospital-1")
        assert set(site.await_words(3).values()) == {"finished"}
        assert [len(line["hospitals"]) for line in site.rounds.values()] == [3, 3, 2, 2]
        records = PrivacyLedger(site.party("hospital-0") / "hospital-0-privacy.sqlite3", "hospital-0").records()
        assert [record["round"] for record in records] == [1, 2, 3] and all(record["released"] for record in records)


CHECKED = {
    "aggregation": {"norm_check": True, "norm_bound": 1.0, "weighted": False},
    "federation": {"quorum": 2},
}


def test_a_boosted_update_is_left_out_and_the_ledger_says_so(tmp_path: Path) -> None:
    """Hospital 2 sends ten times what it learned, in round 2."""
    with Site(tmp_path, **CHECKED) as site:
        site.start_all(boosting="hospital-2")
        assert set(site.await_words(4).values()) == {"finished"}
        assert {n: tuple(line["hospitals"]) for n, line in site.rounds.items()} == {
            0: ALL, 1: ALL, 2: ("hospital-0", "hospital-1"), 3: ALL
        }  # fmt: skip
        openings = [json.loads(line) for line in (site.party("hospital-0") / "openings.jsonl").read_text().splitlines()]
        checks = [opening for opening in openings if opening["why"].startswith("norm check")]
        assert [(check["shape"], check["to"]) for check in checks] == [([3], ["aggregator"])] * 3
        assert torch.equal(site.parameters("hospital-2"), site.parameters("aggregator"))
        site.verify("aggregator", "hospital-0", "hospital-1")


@pytest.mark.slow
def test_a_hospital_lost_in_the_check_makes_the_sum_begin_again(tmp_path: Path) -> None:
    with Site(tmp_path, **CHECKED) as site:
        site.start_all(dies_in_check="hospital-1")
        site.await_death("hospital-1")
        assert set(site.await_words(3).values()) == {"finished"}
        assert [len(line["hospitals"]) for line in site.rounds.values()] == [3, 2, 2, 2]
        site.verify("aggregator", "hospital-0", "hospital-2")


def _command(out: Path, *more: str) -> list[str]:
    settings = [
        "data.image_size=8", "data.phantoms.train_patients=90", "data.phantoms.test_patients=30", "training.rounds=6",
        "model.architecture=mlp", "model.hidden=[4]", "training.local_steps=2", "training.batch_size=16",
        "training.per_sample_gradients=vmap", "training.sampling_seed=5", "privacy.mechanism=none",
        "training.learning_rate=0.01",
    ]  # fmt: skip
    values = [text for setting in settings for text in ("--set", setting)]
    return [
        sys.executable,
        "-m",
        "mpc_fl",
        "train",
        "configs/demo.yaml",
        "--out",
        str(out),
        *values,
        *more,
    ]


@pytest.mark.slow
def test_a_run_whose_launcher_was_killed_goes_on_with_resume(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command(whole), check=True, capture_output=True, cwd=repository, timeout=200)
    process = subprocess.Popen(_command(killed), cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    aggregator = killed.with_name("killed.partial") / "parties" / "aggregator"
    deadline = time.monotonic() + 120
    while not (aggregator / "checkpoint-2.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not killed.exists()
    time.sleep(3.0)  # its parties end themselves; the resumed ones take the same ports only if those are free
    done = subprocess.run(
        _command(killed, "--resume", "--json"), capture_output=True, text=True, cwd=repository, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    summary = json.loads(done.stdout)
    assert sorted(map(int, summary["took_part"])) == list(range(7))
    again = subprocess.run(
        _command(tmp_path / "other", "--resume"),
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=100,
        check=False,
    )
    assert again.returncode == 2 and "there is no run to go on with" in again.stderr
