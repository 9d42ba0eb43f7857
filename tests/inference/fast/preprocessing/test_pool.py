"""Pools of correlations: every record used once, whatever crashes; nothing readable, nothing foreign accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpc_fl import roles
from mpc_fl.apps.cli.commands import app
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.config.config import Config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, PoolError, SecrecyError
from mpc_fl.inference import diagnosis
from mpc_fl.inference.fast import diagnosis as fast_diagnosis
from mpc_fl.inference.fast.messages import READY, network_digest
from mpc_fl.inference.fast.network import Network
from mpc_fl.inference.fast.preprocessing import batch_place, party_pools, pool, sealed_file
from mpc_fl.inference.fast.preprocessing.pool import Pool, Terms, create_pool, open_pool
from mpc_fl.inference.fast.preprocessing.sealed_file import SEGMENT_BYTES
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.links.links import Links
from mpc_fl.roles import DEALER
from tests.inference.fast.online.test_evaluation import small_network
from tests.inference.fast.test_diagnosis import NAMES, configuration, model_of
from tests.support import harness
from tests.support.harness import run_parties

TERMS = Terms("name", "hospital-0", "model-owner", "digest", 1, "logits")
SIZE = 1000


def content(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)


def tag(number: int) -> bytes:
    return bytes([number]) * sealed_file.TAG_BYTES


def filled(directory: Path, count: int, terms: Terms = TERMS) -> Path:
    with create_pool(directory, terms, Seed.from_system(), content(99)) as made:
        for number in range(count):
            made.put(number, tag(number), content(number))
    return directory


def take(directory: Path, number: int) -> np.ndarray:
    with open_pool(directory, "use") as opened:
        found, secret = opened.take(number)
        assert found == tag(number)
        return secret.inside_protocol()


# ---- one party's half --------------------------------------------------------------------------------------------------


def test_a_record_comes_back_once(tmp_path: Path) -> None:
    directory = filled(tmp_path / "pool", 3)
    saved = (directory / "00000001.record").read_bytes()
    with open_pool(directory, "use") as opened:
        assert opened.numbers == [0, 1, 2]
        assert np.array_equal(opened.take(1)[1].inside_protocol(), content(1))
        assert opened.numbers == [2] and opened.end == 3  # used in ascending order: 0 is given up
        for number in (0, 1):
            with pytest.raises(SecrecyError, match="used already"):
                opened.take(number)
        with pytest.raises(PoolError, match="no record 7"):
            opened.take(7)
        assert opened.numbers == [2]
        assert np.array_equal(opened.model().inside_protocol(), content(99))
    assert sorted(path.name for path in directory.glob("*.record")) == ["00000002.record"]
    (directory / "00000001.record").write_bytes(saved)
    with pytest.raises(SecrecyError, match="used already"):
        take(directory, 1)
    with open_pool(directory, "fill") as opened, pytest.raises(SecrecyError, match="used already"):
        opened.put(1, tag(1), content(1))
    # Not even whoever turns the number back, and has the file, can read it again: its key is gone.
    keys = json.loads((directory / pool.KEYS).read_text())
    (directory / pool.KEYS).write_text(json.dumps({**keys, "next": 1}))
    with pytest.raises(PoolError, match="00000001.record was changed"):
        take(directory, 1)


@pytest.mark.parametrize("size", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, 2 * SEGMENT_BYTES + 5])
def test_contents_of_any_size(size: int, tmp_path: Path) -> None:
    with create_pool(tmp_path, TERMS, Seed.from_system(), content(1)) as made:
        made.put(0, tag(0), content(0, size))
    assert np.array_equal(take(tmp_path, 0), content(0, size))


def test_nothing_lies_on_the_disk_in_the_clear(tmp_path: Path) -> None:
    directory = filled(tmp_path / "pool", 2)
    for path in directory.iterdir():
        held = path.read_bytes()
        assert not any(content(number)[:16].tobytes() in held for number in (0, 1, 99))
        if path.suffix != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    one, two = ((directory / f"0000000{number}.record").read_bytes() for number in (0, 1))
    assert one[30:46] == tag(0) and one[14:30] != two[14:30]  # the salt of a file's key


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_a_segment(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: 46 + SEGMENT_BYTES + 16])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, _: Path) -> None:
    held = bytearray(path.read_bytes())
    held[100] ^= 1
    path.write_bytes(bytes(held))


def flip_tag(path: Path, _: Path) -> None:
    held = bytearray(path.read_bytes())
    held[40] ^= 1
    path.write_bytes(bytes(held))


def rename(path: Path, _: Path) -> None:
    shutil.copy(path.with_name("00000001.record"), path)


def exchange_segments(path: Path, _: Path) -> None:
    held, size = path.read_bytes(), SEGMENT_BYTES + 16
    path.write_bytes(held[:46] + held[46 + size : 46 + 2 * size] + held[46 : 46 + size] + held[46 + 2 * size :])


def of_another(path: Path, other: Path) -> None:
    shutil.copy(other / path.name, path)


@pytest.mark.parametrize(
    "damage", [cut, cut_to_a_segment, empty, flip, flip_tag, rename, exchange_segments, of_another]
)
def test_changed_files_are_refused_by_name(damage: Callable[[Path, Path], None], tmp_path: Path) -> None:
    for name in ("pool", "other"):
        with create_pool(tmp_path / name, TERMS, Seed.from_system(), content(99)) as made:
            made.put(0, tag(0), content(0, 2 * SEGMENT_BYTES + 5))
            made.put(1, tag(1), content(1))
    damage(tmp_path / "pool" / "00000000.record", tmp_path / "other")
    with open_pool(tmp_path / "pool", "use") as opened:
        with pytest.raises(PoolError, match="00000000.record (was changed|is no file)") as error:
            opened.take(0)
        assert "\n" not in str(error.value) and str(tmp_path) not in error.value.for_peers
        assert np.array_equal(opened.take(1)[1].inside_protocol(), content(1))  # the pool goes on with the next


def test_a_record_opens_for_its_own_terms_only(tmp_path: Path) -> None:
    directory = filled(tmp_path, 1)
    keys = json.loads((directory / pool.KEYS).read_text())
    for change in ({"counterpart": "hospital-1"}, {"network": "other"}, {"reveal": "label"}, {"records": 2}):
        (directory / pool.KEYS).write_text(json.dumps({**keys, "terms": {**keys["terms"], **change}}))
        with open_pool(directory, None) as opened, pytest.raises(PoolError, match="model was changed"):
            opened.model()
    (directory / pool.KEYS).write_text(json.dumps(keys)[:-5])
    with pytest.raises(PoolError, match="keys is damaged"):
        open_pool(directory, None)


def test_one_process_uses_and_one_fills(tmp_path: Path) -> None:
    directory = filled(tmp_path, 2)
    with open_pool(directory, "use") as used:
        with pytest.raises(PoolError, match="another process is using"):
            open_pool(directory, "use")
        with open_pool(directory, "fill") as filling:
            used.take(0)
            filling.put(2, tag(2), content(2))  # under a key ahead of the ones that are left
            with pytest.raises(SecrecyError, match="not opened to use"):
                filling.take(1)
        assert np.array_equal(used.take(2)[1].inside_protocol(), content(2))
    with pytest.raises(PoolError, match="holds another pool"):
        create_pool(directory, TERMS, Seed.from_system(), content(99))
    os.chmod(directory / pool.KEYS, 0o640)
    with pytest.raises(PoolError, match="can be read by other users"):
        open_pool(directory, "use")


# ---- crashes -----------------------------------------------------------------------------------------------------------


def events_below(directory: Path, act: Callable[[str], None]) -> None:
    """Call `act` before each operation on files below `directory` in this process, from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.")):
            names = [str(argument) for argument in arguments if isinstance(argument, (str, Path))]
            if any(str(directory) in name for name in names):
                act(f"{event} {' '.join(Path(name).name for name in names)}")

    sys.addaudithook(hook)


def use_one(directory: Path, kill_at: int, seen: Path) -> None:
    """Take the first record that is left and use it: its digest is told. Killed before file operation `kill_at`."""
    count = 0

    def act(event: str) -> None:
        nonlocal count
        count += 1
        os.write(events, event.encode() + b"\n")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    told = os.open(seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    events = os.open(f"{seen}-{kill_at}", os.O_WRONLY | os.O_CREAT)
    events_below(directory, act)
    opened = open_pool(directory, "use")
    secret = opened.take(opened.numbers[0])[1]
    os.write(told, hashlib.sha256(secret.inside_protocol().tobytes()).hexdigest().encode() + b"\n")
    act("after use")


def test_killed_at_any_point_no_record_is_used_twice(tmp_path: Path) -> None:
    """kill -9 before each file operation of opening, marking and reading a record, then the same pool again."""
    directory, seen = filled(tmp_path / "pool", 40), tmp_path / "seen"
    spare, wasted, kill_at, code = 0, 0, 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        kill_at += 1
        before = open_pool(directory, None).next
        told = len(seen.read_text().splitlines()) if seen.exists() else 0
        process = harness.SPAWN.Process(target=use_one, args=(directory, kill_at, seen))
        process.start()
        process.join()
        code = process.exitcode
        advanced = open_pool(directory, None).next - before
        used = len(seen.read_text().splitlines()) - told
        assert used <= advanced <= 1
        spare, wasted = spare + (advanced == 0), wasted + (advanced > used)
    assert code == 0
    events = Path(f"{seen}-{kill_at}").read_text().splitlines()
    marked = next(
        place for place, event in enumerate(events) if event.startswith("os.rename") and event.endswith(" keys")
    )
    read = [place for place, event in enumerate(events) if event.startswith("open") and ".record" in event]
    assert read and min(read) > marked  # nothing of it is read before it counts as used
    assert spare >= 3 and wasted >= 2  # both kinds of crash were met
    with open_pool(directory, "use") as opened:
        for number in opened.numbers:
            opened.take(number)
            with seen.open("a") as file:
                file.write(hashlib.sha256(content(number).tobytes()).hexdigest() + "\n")
    digests = seen.read_text().splitlines()
    assert len(digests) == len(set(digests)) == 40 - wasted
    assert not list(directory.glob(".*"))  # no file of a crash holds on to an old key


# ---- both parties ------------------------------------------------------------------------------------------------------


def images(count: int) -> Dataset:
    inputs = public_phantoms(40, configuration(engine="fast"))[:count]
    return Dataset(inputs, torch.zeros(count, dtype=torch.int64), torch.arange(count), tuple("abcdefgh"[:count]))


def plain(count: int) -> torch.Tensor:
    with torch.no_grad():
        return model_of(configuration(engine="fast"))(images(count).inputs)


def config_of(directory: str, **inference: Any) -> Config:
    return configuration(engine="fast", **inference).with_values(
        site={"pool": f"{directory}/pool", "model": f"{directory}/model.safetensors"}
    )


def note(links: Links, directory: str, kill_at: str) -> None:
    """Write down which places of the pool are asked for, and how many layers of F come; kill this process at a point."""
    send, receive = links.send_object, links.receive_tensor

    def die_at(point: str) -> None:
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def send_object(receiver: str, what: str, value: dict[str, Any]) -> None:
        if value.get("step") == "take":
            with open(f"{directory}/places", "a") as file:
                file.write(f"{value['place']}\n")
            die_at("before asking")
        send(receiver, what, value)
        if value.get("step") in ("take", "evaluate"):
            die_at(f"after {value['step']}")

    def receive_tensor(sender: str, what: str, *rest: Any) -> torch.Tensor:
        if what.startswith("masked weights"):
            with open(f"{directory}/layers", "a") as file:
                file.write(f"{what}\n")
        return receive(sender, what, *rest)

    def receive_object(sender: str, what: str, *rest: Any) -> Any:
        value = receive_word(sender, what, *rest)
        if what == READY:
            die_at("before taking")
        return value

    receive_word = links.receive_object
    links.send_object, links.receive_tensor = send_object, receive_tensor  # type: ignore[method-assign]
    links.receive_object = receive_object  # type: ignore[method-assign]


def one_party(links: Links, inference: dict[str, Any], directory: str, count: int, kill_at: str = "") -> Any:
    config = config_of(directory, **inference)
    if links.name == DEALER:
        return diagnosis.dealing_of(config)(links)
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    if links.name == roles.MODEL_OWNER:
        model = model_of(config)
        if kill_at == "other model":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-3  # the public network stays the same
        return diagnosis.answer_requests(config, model, links, record)
    note(links, directory, kill_at)
    if config.inference.fill:
        return fast_diagnosis.fill_pool(config, links, record, lambda *_: None)
    found = diagnosis.request_diagnoses(config, images(count), links, record, lambda *_: None)
    return [result.logits.tolist() for result in found]


class Site:
    """Sessions that share pools, each with new identities and keys."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.sessions = directory, 0
        config = configuration(engine="fast")
        save_model(directory / "model.safetensors", model_of(config), config)

    def _session(self) -> Path:
        self.sessions += 1
        return self.directory / f"session-{self.sessions}"

    def run(self, count: int, names: list[str] = NAMES, kill_at: str = "", **inference: Any) -> Any:
        arguments = (inference, str(self.directory), count, kill_at)
        return run_parties(one_party, names, self._session(), *arguments)[roles.HOSPITAL]

    def crash(self, count: int, kill_at: str) -> None:
        """A session whose hospital is killed at a point."""
        session = self._session()
        make_local_identities(NAMES, {name: session / name for name in NAMES})
        ports, queue = dict(zip(NAMES, harness.free_ports(3), strict=True)), harness.SPAWN.Queue()
        arguments = ({}, str(self.directory), count, kill_at)
        processes = [
            harness.SPAWN.Process(
                target=harness._party, args=(one_party, name, NAMES, ports, session, arguments, {}, queue)
            )
            for name in NAMES
        ]
        for process in processes:
            process.start()
        for _ in NAMES[1:]:
            queue.get(timeout=120)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL, 1, 1]

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def half(self, party: str) -> Pool:
        other = roles.MODEL_OWNER if party == roles.HOSPITAL else roles.HOSPITAL
        return open_pool(self.directory / "pool" / party / other, None)


def assert_close(logits: list[list[float]], count: int) -> None:
    assert float((torch.tensor(logits) - plain(count)).abs().max()) < 0.02


@pytest.mark.processes
def test_a_pool_between_real_processes(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.run(0, fill=2)
    assert site.half(roles.HOSPITAL).numbers == site.half(roles.MODEL_OWNER).numbers == [0, 1]
    assert_close(site.run(3), 3)
    assert site.lines("places") == ["0", "1"]


@pytest.mark.processes
def test_diagnoses_from_a_pool(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.run(0, fill=3)
    layers = len(site.lines("layers"))
    assert layers > 0 and site.half(roles.HOSPITAL).numbers == site.half(roles.MODEL_OWNER).numbers == [0, 1, 2]
    assert not (tmp_path / "pool" / DEALER).exists()
    assert_close(site.run(3), 3)  # batches of 2 and 1: the second is filled up
    assert site.lines("places") == ["0", "1"]
    # One more from the pool, the next from the dealer, under the same B: F is never sent again.
    assert_close(site.run(4), 4)
    assert site.lines("places") == ["0", "1", "2"] and len(site.lines("layers")) == layers
    # Without dealer, and with nothing left, the error says what to do.
    with pytest.raises(AssertionError, match="PoolError: no batch is left in the pool and no dealer takes part"):
        site.run(1, NAMES[:2], dealer=False)
    site.run(0, fill=1)
    assert_close(site.run(1, NAMES[:2], dealer=False), 1)
    assert site.lines("places") == ["0", "1", "2", "3"] and len(site.lines("layers")) == layers
    with pytest.raises(AssertionError, match="PoolError: the pool at .* is for another model"):
        site.run(1, kill_at="other model")


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_hospital_never_uses_a_batch_twice(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.run(0, fill=4)
    backup = tmp_path / "backup"
    half = site.half(roles.HOSPITAL).directory
    shutil.copytree(half, backup)
    site.crash(1, "before asking")  # nothing was used
    assert (site.half(roles.HOSPITAL).next, site.half(roles.MODEL_OWNER).next) == (0, 0)
    site.crash(1, "before taking")  # S has marked batch 0, C has not
    assert (site.half(roles.HOSPITAL).next, site.half(roles.MODEL_OWNER).next) == (0, 1)
    site.crash(1, "after evaluate")  # batch 1: messages under its masks are on their way
    assert site.half(roles.HOSPITAL).next == site.half(roles.MODEL_OWNER).next == 2
    # C's whole half is put back from a backup: it cannot know, but S does.
    shutil.rmtree(half)
    shutil.copytree(backup, half)
    assert site.half(roles.HOSPITAL).numbers == [0, 1, 2, 3]
    assert site.run(0) == []
    assert site.half(roles.HOSPITAL).next == 2  # told by S, and on the disk before anything is asked
    assert_close(site.run(1), 1)
    assert site.lines("places") == ["0", "0", "1", "2"]
    assert site.half(roles.HOSPITAL).numbers == site.half(roles.MODEL_OWNER).numbers == [3]


@pytest.mark.processes
@pytest.mark.slow
def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    site, other = Site(tmp_path / "one"), Site(tmp_path / "two")
    for each in (site, other):
        each.run(0, fill=1)
    half = site.half(roles.HOSPITAL).directory
    shutil.rmtree(half)
    shutil.copytree(other.half(roles.HOSPITAL).directory, half)
    with pytest.raises(AssertionError, match="does not hold the other half"):
        site.run(1)
    shutil.rmtree(half)
    with pytest.raises(AssertionError, match="does not hold the other half"):
        site.run(0, fill=1)
    assert_close(site.run(1), 1)  # from the dealer
    # The same name is not enough: the key that both made is.
    shutil.copytree(other.half(roles.HOSPITAL).directory, half)
    keys = json.loads((half / pool.KEYS).read_text())
    keys["terms"]["pool"] = site.half(roles.MODEL_OWNER).terms.pool
    (half / pool.KEYS).write_text(json.dumps(keys))
    with pytest.raises(AssertionError, match="does not hold the other half of this pool"):
        site.run(1)
    assert site.half(roles.MODEL_OWNER).numbers == [0]


@pytest.mark.processes
@pytest.mark.slow
def test_halves_of_different_batches_under_one_number(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.run(0, fill=1)
    records = [site.half(party).directory / "00000000.record" for party in NAMES[:2]]
    earlier = records[1].read_bytes()
    for path in records:
        path.unlink()
    site.run(0, fill=1)
    records[1].write_bytes(earlier)  # opens, as it was never used, but C has the other one
    with pytest.raises(AssertionError, match="halves of different batches"):
        site.run(1)


@pytest.mark.processes
@pytest.mark.slow
def test_the_command_line_fills_and_infers(tmp_path: Path) -> None:
    config, model, where = tmp_path / "config.yaml", tmp_path / "model.safetensors", tmp_path / "pool"
    config.write_text(configuration(engine="fast", batch_size=1, limit=2).to_yaml())
    save_model(model, model_of(configuration(engine="fast")), configuration(engine="fast"))

    def command(*arguments: object) -> dict[str, Any]:
        words = [sys.executable, "-c", "from mpc_fl.apps.cli.main import main; main()", *map(str, arguments), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    filling = ("dealer", "fill", config, "--model", model, "--count", 3, "--pool", where)
    assert command(*filling)["left"] == 3
    assert command(*filling, "--below", 3)["filled"] == 0
    settings = [f"site.pool={where}", "inference.dealer=false", "inference.plaintext_reference=true"]
    summary = command(
        "infer", config, "--model", model, "--out", tmp_path / "out", *(w for s in settings for w in ("--set", s))
    )
    assert summary["comparison"]["classes_agree"] and summary["images"] == 2
    assert command("dealer", "status", "--pool", where)["left"] == 1


def test_a_pool_for_something_else_is_refused(tmp_path: Path) -> None:
    network = small_network()
    fitting = dataclasses.replace(TERMS, network=network_digest(network), records=4)
    filled(tmp_path / "hospital-0" / "model-owner", 1, fitting)
    small = dataclasses.replace(network, output="flat")

    def check(purpose: pool.Purpose, records: int, reveal: party_pools.Reveal, asked: Network = network) -> None:
        with party_pools.HospitalPool(tmp_path, "hospital-0", "model-owner", purpose, records, reveal) as found:
            found._require_fitting(asked)

    check("use", 4, "logits")
    check("use", 5, "logits")
    for message, arguments in (
        ("for another network", ("use", 4, "logits", small)),
        ("for inference.reveal=logits", ("use", 4, "label")),
        ("for inference.batch_size=4", ("use", 3, "logits")),
        ("for inference.batch_size=4", ("fill", 5, "logits")),
    ):
        with pytest.raises(PoolError, match=message):
            check(*arguments)  # type: ignore[arg-type]


def test_a_place_is_a_number_and_a_tag() -> None:
    good = batch_place.Place(3, "ab" * 16)
    assert batch_place.Place.from_message(good.message()) == good
    for bad in ({}, {"place": -1}, {"place": True}, {"place": 1 << 40}, {"tag": "xy" * 16}, {"tag": "ab"}, {"tag": 5}):
        with pytest.raises(party_pools.ProtocolError):
            batch_place.Place.from_message({**good.message(), **bad} if bad else {})


def test_what_cannot_be_is_said_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="need inference.engine=fast"):
        configuration(engine="reference", fill=2)
    with pytest.raises(ConfigError, match="filled by the dealer"):
        configuration(engine="fast", fill=2, dealer=False)


def test_the_status_of_pools(tmp_path: Path) -> None:
    filled(tmp_path / "hospital-0" / "model-owner", 3)
    take(tmp_path / "hospital-0" / "model-owner", 0)
    shown = CliRunner().invoke(app, ["dealer", "status", "--pool", str(tmp_path), "--json"])
    found = json.loads(shown.stdout)
    assert found["left"] == 2 and found["pools"][0]["used"] == 1 and found["pools"][0]["numbers"] == [1, 2]
    assert (
        "2 batches of 1 left, 1 used" in CliRunner().invoke(app, ["dealer", "status", "--pool", str(tmp_path)]).stdout
    )
    assert "no pool" in CliRunner().invoke(app, ["dealer", "status", "--pool", str(tmp_path / "none")]).stdout
