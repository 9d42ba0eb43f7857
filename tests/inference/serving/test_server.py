"""A model owner that stays up: turns, limits, and sessions between real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.audit.receipts import RECEIPTS_FILE
from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ConfigError, MpcFlError, ProtocolError, RefusedError
from mpc_fl.inference.fast.preprocessing.batch_place import FIRST_NUMBER
from mpc_fl.inference.fast.preprocessing.pool import open_pool
from mpc_fl.inference.serving.gate import SessionGate
from mpc_fl.inference.serving.quota import Charge, Quota, SessionRate, UsageLedger, free_again, quotas_of
from mpc_fl.inference.serving.service_records import RECORDS_FILE, open_records
from mpc_fl.inference.serving.turns import Rota, Turns
from mpc_fl.inference.serving.visits import Visit, service_digest
from mpc_fl.learning.data.loading import load_images
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.routes import Route
from mpc_fl.links.settings import Reach, Timeouts
from mpc_fl.roles import MODEL_OWNER
from tests.support.harness import SPAWN, interruptible
from tests.support.served import HOSPITALS, Service, asking_party, configuration, make_service_directory

# ---- whose batch is next -----------------------------------------------------------------------------------------------

VISITS = [Visit(name) for name in HOSPITALS]


@given(
    places=st.integers(1, 3),
    events=st.lists(st.tuples(st.sampled_from(["wait", "leave"]), st.sampled_from(VISITS)), max_size=60),
)
def test_nobody_waits_while_another_has_two_turns_and_no_place_stays_free(
    places: int, events: list[tuple[str, Visit]]
) -> None:
    rota, waiting, overtaken = Rota(places, 1e9), set[Visit](), dict[Visit, list[Visit]]()
    for what, visit in events:
        if what == "leave":
            rota.leave(visit)
            waiting.discard(visit)
            overtaken.pop(visit, None)
        elif visit not in waiting | rota.holding:
            rota.wait(visit)
            waiting.add(visit)
            overtaken[visit] = []
        for began in rota.begin(0.0):
            waiting.remove(began)
            del overtaken[began]
            for other in waiting:
                overtaken[other].append(began)
        assert len(rota.holding) <= places
        assert not waiting or len(rota.holding) == places
        assert all(len(others) == len(set(others)) for others in overtaken.values())


def test_leaving_and_coming_back_gains_no_turn() -> None:
    rota, (first, second) = Rota(1, 1e9), VISITS[:2]
    rota.wait(first)
    assert rota.begin(0.0) == [first]
    rota.wait(second)
    rota.leave(first)
    rota.wait(first)
    assert rota.begin(0.0) == [second]
    for visit in (first, second):
        rota.leave(visit)
    rota.wait(second)  # it comes first, but its last turn was the last of all
    rota.wait(first)
    assert rota.begin(0.0) == [first]


def test_a_hospital_that_fills_and_diagnoses_gets_one_part_for_both() -> None:
    rota, filling = Rota(1, 1e9), Visit("hospital-0", "fill")
    began = []
    for _ in range(8):
        for visit in (VISITS[0], filling, VISITS[1]):
            if visit not in rota.holding and visit not in rota._waiting:
                rota.wait(visit)
        began += rota.begin(0.0)
        rota.leave(began[-1])
    assert began == [VISITS[0], VISITS[1], filling, VISITS[1]] * 2


def test_a_turn_that_lasts_too_long_keeps_nobody_waiting() -> None:
    rota = Rota(1, 10.0)
    for visit in VISITS[:2]:
        rota.wait(visit)
    assert rota.begin(0.0) == [VISITS[0]]
    assert rota.begin(9.9) == []
    assert rota.begin(10.0) == [VISITS[1]]
    with pytest.raises(ValueError, match="waits for a turn or has one"):
        rota.wait(VISITS[0])


# ---- limits ------------------------------------------------------------------------------------------------------------


@given(
    asked=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), max_size=40),
    images=st.integers(4, 9),
    seconds=st.integers(1, 90),
)
def test_no_window_ever_holds_more_than_the_limit(asked: list[tuple[int, int]], images: int, seconds: int) -> None:
    quota, now, charges = Quota(images, seconds, ""), 1000, list[Charge]()
    for pause, count in asked:
        now += pause
        again = free_again(quota, charges, count, now)
        if again is not None:
            assert now < again <= now + seconds
            assert free_again(quota, charges, count, again) is None  # it may come back then, and not before
            assert free_again(quota, charges, count, again - 0.5) is not None
            continue
        charges.append(Charge(now, count))
        assert sum(charge.images for charge in charges if charge.time > now - seconds) <= images
    with pytest.raises(ValueError, match="never"):
        free_again(quota, charges, images + 1, now)


@pytest.mark.parametrize(
    ("quotas", "period"), [([Quota(3, 86400, "24 hours")], "24 hours"), ([Quota(3, 60, "a minute")], "a minute")]
)
def test_what_was_asked_counts_after_a_restart(tmp_path: Path, quotas: list[Quota], period: str) -> None:
    moment = 1_800_000_000.0
    with open_records(tmp_path, MODEL_OWNER) as records:
        UsageLedger(records, quotas, lambda: moment).charge("hospital-0", 3)
    moment += quotas[0].seconds - 1
    with open_records(tmp_path, MODEL_OWNER) as records:
        ledger = UsageLedger(records, quotas, lambda: moment)
        with pytest.raises(RefusedError, match=f"may ask about 3 images in {period}: come back at 2027-"):
            ledger.charge("hospital-0", 1)
        ledger.charge("hospital-1", 1)
        moment += 1
        ledger.charge("hospital-0", 3)
    with open_records(tmp_path, MODEL_OWNER) as records:
        with pytest.raises(RefusedError):
            UsageLedger(records, quotas, lambda: moment).require("hospital-0")


def test_all_hospitals_together_have_a_limit_that_no_race_and_no_restart_exceeds(tmp_path: Path) -> None:
    moment = 1_800_000_000.0
    quotas = quotas_of(Config().with_values(serving={"images_per_day": 30, "images_per_minute": 20}))
    assert [(quota.most, quota.of_all) for quota in quotas] == [(30, False), (20, False), (60, True), (40, True)]
    records, barrier = open_records(tmp_path, MODEL_OWNER), threading.Barrier(6)
    ledger = UsageLedger(records, quotas, lambda: moment)
    granted, refused = list[str](), list[str]()

    def ask(name: str) -> None:
        barrier.wait(30)
        for _ in range(15):
            try:
                ledger.charge(name, 1)
                granted.append(name)
            except RefusedError as error:
                refused.append(str(error))

    sessions = [threading.Thread(target=ask, args=(f"hospital-{number % 3}",)) for number in range(6)]
    for session in sessions:
        session.start()
    for session in sessions:
        session.join(60)
    assert len(granted) == 40 and max(map(granted.count, set(granted))) <= 20
    assert "all hospitals together may ask about 40 images in a minute: come back at 2027-01-15 08:01:01 UTC" in refused
    records.close()
    moment += 59
    with open_records(tmp_path, MODEL_OWNER) as records:
        ledger = UsageLedger(records, quotas, lambda: moment)
        with pytest.raises(RefusedError, match="all hospitals together may ask about 40 images in a minute"):
            ledger.charge("hospital-7", 1)
        moment += 1
        ledger.charge("hospital-7", 20)
        moment += 60
        with pytest.raises(
            RefusedError, match="all hospitals together may ask about 60 images in 24 hours: come back at 2027-01-16"
        ):
            ledger.charge("hospital-8", 1)


def test_names_of_sessions() -> None:
    assert Visit.of_session("hospital-12/" + "0" * 32) == Visit("hospital-12")
    for visit in (Visit("hospital-3"), Visit("hospital-3", "fill")):
        assert Visit.of_session(visit.new_session()) == visit
    digits = "0" * 32
    for wrong in ("", "hospital-0", f"hospital-01/{digits}", f"dealer/{digits}", f"hospital-0/{digits[1:]}"):
        assert Visit.of_session(wrong) is None
    assert Visit.of_session(f"hospital-0/use-{digits}") is None


def test_a_hospital_that_hammers_begins_a_bounded_number_of_sessions_and_a_restart_frees_none(tmp_path: Path) -> None:
    moment, begun = 1_800_000_000.0, []
    for _ in range(10):  # the server starts again each half minute
        with open_records(tmp_path, MODEL_OWNER) as records:
            rate = SessionRate(records, 2, lambda: moment)  # noqa: B023 - used in this turn of the loop alone
            for _ in range(60):
                try:
                    rate.begin("hospital-0")
                    begun.append(moment)
                except RefusedError as error:
                    assert "may begin 2 sessions in a minute: come back at 2027-" in str(error)
                moment += 0.5
            rate.begin("hospital-1")
    assert [moment - 1_800_000_000.0 for moment in begun] == [n * 60.0 + k for n in range(5) for k in (0.0, 0.5)]


def test_a_session_does_what_it_is_for_within_one_turn(tmp_path: Path) -> None:
    records = open_records(tmp_path, MODEL_OWNER)
    usage, turns = UsageLedger(records, [Quota(3, 60, "a minute")]), Turns(1, 1e9)
    asking, filling = (
        SessionGate(visit, turns, usage, 5, lambda: None) for visit in (VISITS[0], Visit("hospital-0", "fill"))
    )
    with pytest.raises(ProtocolError, match="in a session that diagnoses"):
        asking.store(0)
    with pytest.raises(ProtocolError, match="in a session that fills"):
        filling.begin(1)
    with asking.session():
        asking.begin(1)
        asking.begin(2)  # answered together: one turn, charged twice
        assert turns._rota.holding == {VISITS[0]}
    with filling.session():
        filling.store(4)  # not charged, but in its turn
        assert turns._rota.holding == {Visit("hospital-0", "fill")}
        with pytest.raises(RefusedError, match="keeps 5 batches for hospital-0, no more than 5: come back when"):
            filling.store(5)
    assert not turns._rota.holding
    with pytest.raises(RefusedError, match="may ask about 3 images"), asking.session():
        asking.begin(1)
    records.close()


def test_a_batch_must_be_within_the_limits() -> None:
    with pytest.raises(ConfigError, match="batch_size exceeds serving"):
        Config().with_values(task="serve", inference={"batch_size": 30})
    # How much a model owner grants is its own matter.
    assert Config().digest() == Config().with_values(serving={"images_per_day": 7}).digest()


# ---- processes ---------------------------------------------------------------------------------------------------------


def _false_party(kind: str, values: dict[str, Any], told: Any) -> None:
    """Dial the model owner with a certificate of this federation that does not fit the session."""
    config = parse_config(values, kind)
    identity = load_identity(config.site.identity or Path(), "aggregator" if kind == "aggregator" else "hospital-1")
    session = "hospital-0/" + "1" * 32
    if kind == "aggregator":
        identity = replace(identity, name="hospital-0")
    peers = {name: Route("dial", address) for name, address in config.federation.addresses.items()}
    agreement = Agreement(session, service_digest(config), "serve")
    links = NetworkLinks(identity, agreement, Reach(None, peers), Timeouts(20.0, 5.0))
    try:
        with links:
            told.put((kind, "connected"))
    except MpcFlError as error:
        told.put((kind, str(error)))
    told.close()
    told.join_thread()
    os._exit(0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("service")
    make_service_directory(path, configuration())
    return path


@pytest.fixture
def service(directory: Path) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(pools: Path | None = None, reveal: str | None = None, **serving: Any) -> Service:
        serving = {"images_per_minute": 1000, "images_per_day": 1000, "turns": 1, "patience": 600.0, **serving}
        started.append(Service(directory, configuration(), serving, pools, reveal))
        return started[-1]

    for name in (RECORDS_FILE, "corrections", RECEIPTS_FILE):
        for party in ("model-owner", "dealer"):
            (directory / party / name).unlink(missing_ok=True)
    yield start
    for item in started:
        for process in item.asking:
            process.kill()  # one that was stopped would keep a test that failed
        item.end(signal.SIGKILL)


@pytest.mark.processes
def test_hospitals_take_turns_and_a_wrong_certificate_gets_none(
    service: Callable[..., Service], directory: Path, tmp_path: Path
) -> None:
    served, barrier = service(), SPAWN.Barrier(2)
    asking = [served.begin(name, 16, f"fair-{name}", barrier) for name in HOSPITALS[1:]]
    assert [served.told.get(timeout=60)[1] for _ in asking] == ["", ""]
    assert [len(served.results(f"fair-{name}")) for name in HOSPITALS[1:]] == [16, 16]
    # One after the other would be 16 of one and none of the other; a pause of either process may cost it some turns.
    first = served.charged()[:16]
    assert min(first.count(name) for name in HOSPITALS[1:]) >= 3, first
    openings = [json.loads(line) for line in (directory / "model-owner" / "openings.jsonl").read_text().splitlines()]
    assert {tuple(opening["to"]) for opening in openings} == {("hospital-1",), ("hospital-2",)}

    for kind, holder in (("aggregator", "aggregator"), ("another hospital", "hospital-1")):
        process = SPAWN.Process(target=_false_party, args=(kind, served.values(holder), served.told))
        process.start()
        line = served.told.get(timeout=60)[1]
        process.join(30)
        wrong = "was used as" if kind == "aggregator" else "takes no part in a session of hospital-0"
        assert "refused" in line and wrong in line

    make_local_identities(["hospital-0"], {"hospital-0": tmp_path / "stranger"})
    served.config = served.config.with_values(runtime={"connect_timeout": 2.0})
    values = served.values("hospital-0", {"limit": 1}, identity=str(tmp_path / "stranger"), out=str(tmp_path / "none"))
    process = SPAWN.Process(target=asking_party, args=("hospital-0", values, served.told, None, None, None))
    process.start()
    assert "did not connect within 2 s" in served.told.get(timeout=60)[1]
    process.join(30)
    assert served.end(signal.SIGTERM) == [0, 0]


@pytest.mark.processes
def test_limits_survive_the_death_of_the_server(service: Callable[..., Service]) -> None:
    served = service(images_per_day=3)
    line, results = served.ask("hospital-0", 5, "limited")
    assert line.startswith(
        "3 of 5 images were answered; hospital-0 may ask about 3 images in 24 hours: come back at 20"
    )
    assert [result["index"] for result in results] == [0, 1, 2]
    assert served.end(signal.SIGKILL) == [-signal.SIGKILL] * 2
    served = service(images_per_day=3)
    line, results = served.ask("hospital-0", 1, "limited again")
    assert line.startswith("hospital-0 may ask about 3 images in 24 hours: come back at 20") and not results
    line, results = served.ask("hospital-1", 1, "not limited")
    assert (line, len(results)) == ("", 1)


@pytest.mark.processes
def test_two_servers_of_one_model_owner_share_its_limits(service: Callable[..., Service], directory: Path) -> None:
    limits = {"images_per_day": 3, "images_per_day_of_all": 5}
    one, other = service(**limits), service(**limits)
    assert (one.ask("hospital-0", 2, "of one")[0], len(one.results("of one"))) == ("", 2)
    line, results = other.ask("hospital-0", 2, "of the other")
    assert line.startswith("1 of 2 images were answered; hospital-0 may ask about 3 images in 24 hours")
    line, results = one.ask("hospital-1", 3, "of one again")
    assert len(results) == 2 and "all hospitals together may ask about 5 images in 24 hours" in line
    assert one.charged() == ["hospital-0"] * 3 + ["hospital-1"] * 2
    receipts = ReceiptFile(directory / "model-owner", load_identity(directory / "model-owner", MODEL_OWNER))
    assert receipts.path.is_file()  # of both servers, and its lines follow each other
    assert [served.end(signal.SIGTERM) for served in (one, other)] == [[0, 0]] * 2


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "serving"),
    [
        (signal.SIGKILL, {}),
        (signal.SIGSTOP, {"patience": 1.0, "deadline": 600.0}),
        (signal.SIGSTOP, {"patience": 600.0, "deadline": 3.0}),
    ],
    ids=["dies", "hangs", "hangs until its deadline"],
)
def test_a_hospital_that_dies_or_hangs_in_a_query_harms_nobody(
    service: Callable[..., Service], number: int, serving: dict[str, float]
) -> None:
    # Its turn ends with its link, when it has lasted too long, or with its session; there is only one.
    served, out = service(**serving), f"{number}-{serving.get('patience')}"
    lost = served.begin("hospital-0", 2, "lost", trigger=("masked 0", number))
    assert served.before.get(timeout=60) == ("hospital-0", "about to stop")
    line, results = served.ask("hospital-1", 2, f"unharmed-{out}")
    assert (line, len(results)) == ("", 2)
    if number == signal.SIGSTOP and serving["deadline"] == 600.0:
        assert served.ask("hospital-0", 1, "too early")[0] == (
            "a session of hospital-0 goes on already: come back when it has ended"
        )
    else:  # the session has ended: it may come back, though a process of it still hangs
        line, results = served.ask("hospital-0", 1, f"back-{out}")
        assert (line, len(results)) == ("", 1)
    if number == signal.SIGSTOP:
        os.kill(lost.pid, signal.SIGKILL)
    lost.join(30)
    assert lost.exitcode == -signal.SIGKILL
    assert served.end(signal.SIGTERM) == [0, 0]


# ---- pools ---------------------------------------------------------------------------------------------------------------


def largest_error(directory: Path, results: list[dict[str, Any]], asked: int) -> float:
    """Of the logits of the first of `asked` images."""
    config = configuration()
    with torch.no_grad():
        images = load_images(None, config, asked).inputs[: len(results)]
        plain = load_model(directory / "model.safetensors", config)(images)
    return float((torch.tensor([result["logits"] for result in results]) - plain).abs().max())


@pytest.mark.processes
def test_a_served_hospital_uses_its_pool(service: Callable[..., Service], directory: Path, tmp_path: Path) -> None:
    served = service(tmp_path, reveal="logits", pool_batches=3, images_per_day=4)
    assert served.fill("hospital-1", 5) == (
        "the model owner keeps 3 batches for hospital-1, no more than 3: come back when some are used"
    )
    assert served.left("hospital-1") == [0, 1, 2] and not served.charged()
    made = served.corrections()
    assert made > 0
    line, results = served.ask("hospital-1", 2, "from the pool")
    assert (line, len(results)) == ("", 2) and largest_error(directory, results, 2) < 0.02
    assert served.left("hospital-1") == [2] and served.corrections() == made
    assert served.charged() == ["hospital-1"] * 2
    # The last one, then one by the dealer; a fifth image is over the limit.
    line, results = served.ask("hospital-1", 3, "until the limit")
    assert line.startswith("2 of 3 images were answered; hospital-1 may ask about 4 images in 24 hours")
    assert largest_error(directory, results, 3) < 0.02
    assert served.left("hospital-1") == [] and served.corrections() > made
    # Who is refused has used nothing of a pool.
    assert served.fill("hospital-1", 1) == ""
    line, results = served.ask("hospital-1", 1, "over the limit")
    assert "may ask about 4 images in 24 hours" in line and not results
    assert served.left("hospital-1") == [3]
    # Another hospital, without a pool.
    served.pools = None
    line, results = served.ask("hospital-2", 1, "without a pool")
    assert (line, len(results)) == ("", 1) and largest_error(directory, results, 1) < 0.02
    assert served.end(signal.SIGTERM) == [0, 0]


@pytest.mark.processes
def test_a_hospital_fills_while_it_diagnoses_and_a_killed_one_wastes_a_batch(
    service: Callable[..., Service], tmp_path: Path
) -> None:
    served = service(tmp_path, turns=2)
    assert served.fill("hospital-0", 2) == ""
    asking = served.begin("hospital-0", 2, "slow", trigger=(f"masked {FIRST_NUMBER}", signal.SIGSTOP))
    assert served.before.get(timeout=60) == ("hospital-0", "about to stop")
    assert served.fill("hospital-0", 2) == ""  # begins and ends while the other session is in the middle of a batch
    assert served.left("hospital-0") == [1, 2, 3]
    os.kill(asking.pid, signal.SIGCONT)
    assert served.told.get(timeout=60) == ("hospital-0", "")
    asking.join(30)
    assert len(served.results("slow")) == 2 and served.left("hospital-0") == [2, 3]

    made = served.corrections()
    killed = served.begin("hospital-0", 1, "killed", trigger=(f"masked {FIRST_NUMBER + 2}", signal.SIGKILL))
    assert served.before.get(timeout=60) == ("hospital-0", "about to stop")
    killed.join(30)
    assert served.left("hospital-0") == [3]  # at either side, though no answer came
    line, results = served.ask("hospital-0", 1, "after the killed one")
    assert (line, len(results)) == ("", 1)
    assert served.left("hospital-0") == [] and served.corrections() == made
    assert served.charged() == ["hospital-0"] * 4
    assert served.end(signal.SIGTERM) == [0, 0]


@pytest.mark.processes
def test_who_keeps_no_pools_says_so_and_who_hammers_is_held_off(
    service: Callable[..., Service], directory: Path, tmp_path: Path
) -> None:
    served = service(sessions_per_minute=2)
    served.pools = tmp_path
    assert served.fill("hospital-2", 1) == "this model owner keeps no pools: ask it to set site.pool"
    for number in range(2):
        line, results = served.ask("hospital-0", 1, f"hammering {number}")
        assert (line, len(results)) == ("", 1)
    line, results = served.ask("hospital-0", 1, "hammering too much")
    assert line.startswith("hospital-0 may begin 2 sessions in a minute: come back at 20") and not results
    line, results = served.ask("hospital-1", 1, "not hammering")
    assert (line, len(results)) == ("", 1)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_line_keeps_a_pool_filled_and_asks(
    service: Callable[..., Service], directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    served = service(tmp_path)
    (tmp_path / "federation.yaml").write_text(configuration().to_yaml())
    addresses = served.config.federation.addresses
    program = [sys.executable, "-c", "from mpc_fl.apps.cli.main import main; main()"]
    common = [tmp_path / "federation.yaml", "--identity", directory / "hospital-2", "--json"]
    common += ["--server", addresses["model-owner"], "--dealer", addresses["dealer"]]
    filling = ["dealer", "fill", *common, "--pool", tmp_path / "asking"]
    filling += ["--count", 2, "--below", 2, "--every", 1]
    with interruptible():
        filler = subprocess.Popen(
            [*program, *map(str, filling)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    with filler:
        try:
            assert filler.stdout is not None and filler.stderr is not None
            first = json.loads(filler.stdout.readline())
            assert (first["filled"], first["left"]) == (2, 2)
            assert json.loads(filler.stdout.readline())["filled"] == 0  # enough

            asking = ["infer", *common, "--out", tmp_path / "out", "--set", f"site.pool={tmp_path / 'asking'}"]
            asking += ["--set", "inference.limit=1"]
            done = subprocess.run([*program, *map(str, asking)], capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr
            made = served.corrections()
            assert json.loads(done.stdout)["images"] == 1
            page = (tmp_path / "out" / "report.html").read_text()
            assert "Encrypted diagnosis" in page and "Not shown: " not in page and "phantom" in page
            assert (tmp_path / "out" / "report.html").stat().st_mode & 0o777 == 0o600

            told: dict[str, Any] = {"filled": 0}
            while not told["filled"]:  # one batch is left: fewer than 2
                told = json.loads(filler.stdout.readline())
            assert (told["filled"], told["left"]) == (2, 3) and served.corrections() >= made
            filler.send_signal(number)
            assert filler.wait(30) == 128 + number
            assert filler.stderr.read() == f"mpc-fl: interrupted by {number.name}: nothing was left running\n"
        finally:
            filler.kill()
    for half in served.halves("hospital-2"):
        open_pool(half.directory, "fill").close()  # nobody holds it
    assert served.left("hospital-2") == [1, 2, 3]
    assert served.end(signal.SIGTERM) == [0, 0]
