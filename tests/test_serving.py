"""A model owner that stays up: turns, limits, and sessions between real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import SPAWN, free_ports
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.authority import make_local_identities
from mpc_fl.config import Config, parse_config
from mpc_fl.errors import ConfigError, MpcFlError, RefusedError
from mpc_fl.handshake import Agreement
from mpc_fl.identity import load_identity
from mpc_fl.models import build_model, calibrate_batchnorm
from mpc_fl.phantoms import public_phantoms
from mpc_fl.routes import Route
from mpc_fl.serving import USAGE_FILE, Charge, Limit, Rota, UsageLedger, free_again, hospital_of, service_digest
from mpc_fl.transport import Links
from mpc_fl.weights import save_model

# ---- whose batch is next -----------------------------------------------------------------------------------------------

HOSPITALS = ["hospital-0", "hospital-1", "hospital-2"]


@given(
    places=st.integers(1, 3),
    events=st.lists(st.tuples(st.sampled_from(["wait", "leave"]), st.sampled_from(HOSPITALS)), max_size=60),
)
def test_nobody_waits_while_another_has_two_turns_and_no_place_stays_free(
    places: int, events: list[tuple[str, str]]
) -> None:
    rota, waiting, overtaken = Rota(places, 1e9), set[str](), dict[str, list[str]]()
    for what, hospital in events:
        if what == "leave":
            rota.leave(hospital)
            waiting.discard(hospital)
            overtaken.pop(hospital, None)
        elif hospital not in waiting | rota.holding:
            rota.wait(hospital)
            waiting.add(hospital)
            overtaken[hospital] = []
        for began in rota.begin(0.0):
            waiting.remove(began)
            del overtaken[began]
            for other in waiting:
                overtaken[other].append(began)
        assert len(rota.holding) <= places
        assert not waiting or len(rota.holding) == places
        assert all(len(others) == len(set(others)) for others in overtaken.values())


def test_leaving_and_coming_back_gains_no_turn() -> None:
    rota = Rota(1, 1e9)
    rota.wait("hospital-0")
    assert rota.begin(0.0) == ["hospital-0"]
    rota.wait("hospital-1")
    rota.leave("hospital-0")
    rota.wait("hospital-0")
    assert rota.begin(0.0) == ["hospital-1"]
    for hospital in ("hospital-0", "hospital-1"):
        rota.leave(hospital)
    rota.wait("hospital-1")  # it comes first, but its last turn was the last of all
    rota.wait("hospital-0")
    assert rota.begin(0.0) == ["hospital-0"]


def test_a_turn_that_lasts_too_long_keeps_nobody_waiting() -> None:
    rota = Rota(1, 10.0)
    for hospital in HOSPITALS[:2]:
        rota.wait(hospital)
    assert rota.begin(0.0) == ["hospital-0"]
    assert rota.begin(9.9) == []
    assert rota.begin(10.0) == ["hospital-1"]
    with pytest.raises(ValueError, match="waits for a turn or has one"):
        rota.wait("hospital-0")


# ---- limits ------------------------------------------------------------------------------------------------------------


@given(
    asked=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 4)), max_size=40),
    images=st.integers(4, 9),
    seconds=st.integers(1, 90),
)
def test_no_window_ever_holds_more_than_the_limit(asked: list[tuple[int, int]], images: int, seconds: int) -> None:
    limit, now, charges = Limit(images, seconds, ""), 1000, list[Charge]()
    for pause, count in asked:
        now += pause
        again = free_again(limit, charges, count, now)
        if again is not None:
            assert now < again <= now + seconds
            assert free_again(limit, charges, count, again) is None  # it may come back then, and not before
            assert free_again(limit, charges, count, again - 0.5) is not None
            continue
        charges.append(Charge(now, count))
        assert sum(charge.images for charge in charges if charge.time > now - seconds) <= images
    with pytest.raises(ValueError, match="never"):
        free_again(limit, charges, images + 1, now)


@pytest.mark.parametrize(
    ("limits", "period"), [([Limit(3, 86400, "24 hours")], "24 hours"), ([Limit(3, 60, "a minute")], "a minute")]
)
def test_what_was_asked_counts_after_a_restart(tmp_path: Path, limits: list[Limit], period: str) -> None:
    moment = 1_800_000_000.0
    ledger = UsageLedger(tmp_path, limits, lambda: moment)
    ledger.charge("hospital-0", 3)
    with pytest.raises(MpcFlError, match="another process is serving"):
        UsageLedger(tmp_path, limits)
    ledger.close()
    with (tmp_path / USAGE_FILE).open("a") as file:
        file.write('{"time": 18000000')  # the crash cut a line off
    moment += limits[0].seconds - 1
    ledger = UsageLedger(tmp_path, limits, lambda: moment)
    with pytest.raises(RefusedError, match=f"may ask about 3 images in {period}: come back at 2027-"):
        ledger.charge("hospital-0", 1)
    ledger.charge("hospital-1", 1)
    moment += 1
    ledger.charge("hospital-0", 3)
    ledger.close()
    ledger = UsageLedger(tmp_path, limits, lambda: moment)
    with pytest.raises(RefusedError):
        ledger.require("hospital-0")
    ledger.close()


def test_a_damaged_record_of_usage_frees_nobody(tmp_path: Path) -> None:
    (tmp_path / USAGE_FILE).write_text('{"time": 1, "hospital": "hospital-0", "images": -5}\n')
    for _ in range(2):
        with pytest.raises(MpcFlError, match="is damaged"):
            UsageLedger(tmp_path, [Limit(3, 60, "a minute")])


def test_names_of_sessions() -> None:
    assert hospital_of("hospital-12/" + "0" * 32) == "hospital-12"
    for wrong in ("hospital-0", "hospital-01/" + "0" * 32, "dealer/" + "0" * 32, "hospital-0/" + "0" * 31, ""):
        assert hospital_of(wrong) is None


def test_a_batch_must_be_within_the_limits() -> None:
    with pytest.raises(ConfigError, match="batch_size exceeds serving"):
        Config().with_values(task="serve", inference={"batch_size": 30})
    # How much a model owner grants is its own matter.
    assert Config().digest() == Config().with_values(serving={"images_per_day": 7}).digest()


# ---- processes ---------------------------------------------------------------------------------------------------------

Trigger = tuple[str, int] | None  # the first frame of a tag that begins so makes the hospital send itself a signal


def _served_party(name: str, values: dict[str, Any], told: Any) -> None:
    from parties import dealer, model_owner

    torch.set_num_threads(1)
    program = model_owner if name == "model-owner" else dealer
    program.run(parse_config(values, name), 0, lambda phase, done, total: told.put((name, phase)))


def _asking_party(name: str, values: dict[str, Any], told: Any, barrier: Any, trigger: Trigger) -> None:
    from parties import hospital

    torch.set_num_threads(1)

    def notify(phase: str, done: int, total: int) -> None:
        if phase == "connect" and barrier is not None:
            barrier.wait(60)

    def observe(sender: str, frame: Any) -> None:
        if trigger is not None and frame.tag.startswith(trigger[0]):
            told.put((name, "about to stop"))
            told.close()
            told.join_thread()
            os.kill(os.getpid(), trigger[1])

    try:
        hospital.ask(parse_config(values, name), name, notify, observe)
        told.put((name, ""))
    except MpcFlError as error:
        told.put((name, str(error)))
    told.close()
    told.join_thread()
    os._exit(0)  # threads of a lost link must not keep the process


def _false_party(kind: str, values: dict[str, Any], told: Any) -> None:
    """Dial the model owner with a certificate of this federation that does not fit the session."""
    config = parse_config(values, kind)
    identity = load_identity(config.site.identity or Path(), "aggregator" if kind == "aggregator" else "hospital-1")
    session = "hospital-0/" + "1" * 32
    if kind == "aggregator":
        identity = replace(identity, name="hospital-0")
    peers = {name: Route("dial", address) for name, address in config.federation.addresses.items()}
    links = Links(identity, None, peers, Agreement(session, service_digest(config), "serve"), 20.0, 5.0)
    try:
        with links:
            told.put((kind, "connected"))
    except MpcFlError as error:
        told.put((kind, str(error)))
    told.close()
    told.join_thread()
    os._exit(0)


class Service:
    """Model owner and dealer as processes, hospitals that ask them."""

    def __init__(self, directory: Path, serving: dict[str, Any]) -> None:
        self.directory, self.told = directory, SPAWN.Queue()
        ports = free_ports(2)
        addresses = {"model-owner": f"127.0.0.1:{ports[0]}", "dealer": f"127.0.0.1:{ports[1]}"}
        self.config = configuration().with_values(serving=serving, federation={"addresses": addresses})
        self.servers = []
        for name in addresses:
            site = {"model": str(directory / "model.safetensors"), "out": str(directory / name)}
            values = self.values(name, **site)
            self.servers.append(SPAWN.Process(target=_served_party, args=(name, values, self.told), name=name))
        for process in self.servers:
            process.start()
        ready = set[str]()
        while len(ready) < len(self.servers):
            name, phase = self.told.get(timeout=60)
            ready.update({name} if phase == "serving" else ())

    def values(self, name: str, inference: dict[str, Any] | None = None, **site: str) -> dict[str, Any]:
        site = {"identity": str(self.directory / name), "out": str(self.directory / name), **site}
        return self.config.with_values(site=site, inference=inference or {}).model_dump(mode="json")

    def begin(self, name: str, images: int, out: str, barrier: Any = None, trigger: Trigger = None) -> Any:
        values = self.values(name, {"limit": images}, out=str(self.directory / out))
        process = SPAWN.Process(target=_asking_party, args=(name, values, self.told, barrier, trigger), name=name)
        process.start()
        return process

    def ask(self, name: str, images: int, out: str) -> tuple[str, list[dict[str, Any]]]:
        """The line of the error, and results."""
        self.begin(name, images, out).join(60)
        return self.told.get(timeout=60)[1], self.results(out)

    def results(self, out: str) -> list[dict[str, Any]]:
        path = self.directory / out / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def charged(self) -> list[str]:
        lines = (self.directory / "model-owner" / USAGE_FILE).read_text().splitlines()
        return [json.loads(line)["hospital"] for line in lines]

    def end(self, number: int) -> list[int | None]:
        for process in self.servers:
            if process.exitcode is None:
                os.kill(process.pid, number)
        for process in self.servers:
            process.join(30)
        return [process.exitcode for process in self.servers]


def configuration() -> Config:
    return Config().with_values(
        task="serve", data={"image_size": 16}, inference={"engine": "fast"}, runtime={"connect_timeout": 20.0}
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("service")
    names = [*HOSPITALS, "model-owner", "dealer", "aggregator"]
    make_local_identities(names, {name: path / name for name in names})
    config = configuration()
    model = build_model(config, config.data.input_shape, config.seed)
    calibrate_batchnorm(model, public_phantoms(32, config))
    save_model(path / "model.safetensors", model.eval(), config, None)
    return path


@pytest.fixture
def service(directory: Path) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(**serving: Any) -> Service:
        serving = {"images_per_minute": 1000, "images_per_day": 1000, "turns": 1, "patience": 600.0, **serving}
        started.append(Service(directory, serving))
        return started[-1]

    (directory / "model-owner" / USAGE_FILE).unlink(missing_ok=True)
    yield start
    for item in started:
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
    process = SPAWN.Process(target=_asking_party, args=("hospital-0", values, served.told, None, None))
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
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_hospital_that_dies_or_hangs_in_a_query_harms_nobody(service: Callable[..., Service], number: int) -> None:
    # Its turn ends with its link, or when it has lasted too long; there is only one.
    served = service(**({"patience": 1.0, "deadline": 4.0} if number == signal.SIGSTOP else {}))
    lost = served.begin("hospital-0", 2, "lost", trigger=("masked 0", number))
    assert served.told.get(timeout=60) == ("hospital-0", "about to stop")
    line, results = served.ask("hospital-1", 2, f"unharmed-{number}")
    assert (line, len(results)) == ("", 2)
    if number == signal.SIGKILL:
        lost.join(30)
        assert lost.exitcode == -signal.SIGKILL
        line, results = served.ask("hospital-0", 1, "back")
        assert (line, len(results)) == ("", 1)
    else:
        os.kill(lost.pid, signal.SIGKILL)
        lost.join(30)
    assert served.end(signal.SIGTERM) == [0, 0]
