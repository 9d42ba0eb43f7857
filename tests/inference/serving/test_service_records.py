"""What hospitals used: shared by processes, never lowered by a damaged file, taken over from an earlier version once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.errors import RefusedError, StorageError
from mpc_fl.files import append_json_line
from mpc_fl.inference.serving.quota import Quota, SessionRate, UsageLedger
from mpc_fl.inference.serving.service_records import EARLIER_USAGE, RECORDS_FILE, USAGE, open_records
from mpc_fl.roles import DEALER, MODEL_OWNER
from tests.support.served import charges

NOW = 1_800_000_000.0
PAGE = 4096
QUOTAS = (Quota(10**6, 86400.0, "24 hours"),)


def used(directory: Path) -> dict[str, int]:
    found = dict[str, int]()
    for hospital, images in charges(directory):
        found[hospital] = found.get(hospital, 0) + images
    return found


def charge(directory: Path, hospital: str, images: int, clock: float = NOW) -> None:
    with open_records(directory, MODEL_OWNER) as records:
        UsageLedger(records, QUOTAS, lambda: clock).charge(hospital, images)


# ---- processes that share a directory ------------------------------------------------------------------------------------

_RACE = """
import sys
from pathlib import Path
from mpc_fl.errors import RefusedError
from mpc_fl.inference.serving.quota import Quota, SessionRate, UsageLedger
from mpc_fl.inference.serving.service_records import open_records
quotas = [Quota(9, 60.0, "a minute"), Quota(20, 60.0, "a minute", of_all=True), Quota(30, 86400.0, "24 hours", of_all=True)]
with open_records(Path(sys.argv[1]), "model-owner") as records:
    ledger, rate = (UsageLedger(records, quotas, lambda: 1.8e9), SessionRate(records, 5, lambda: 1.8e9))
    print("ready", flush=True)
    input()
    for number in range(30):
        name = f"hospital-{number % 3}"
        for what, ask in (("image", lambda: ledger.charge(name, 1)), ("session", lambda: rate.begin(name))):
            try:
                ask()
                print(what, name, flush=True)
            except RefusedError:
                pass
"""


def test_processes_that_race_get_together_what_one_would(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RACE, str(tmp_path)]
    racing = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in racing:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in racing:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    granted = list[str]()
    for process in racing:
        out, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (0, "")
        granted += out.splitlines()
    images = [line for line in granted if line.startswith("image")]
    assert len(images) == 20 and max(map(images.count, images)) <= 9
    assert used(tmp_path) == {f"hospital-{rank}": images.count(f"image hospital-{rank}") for rank in range(3)}
    assert [granted.count(f"session hospital-{rank}") for rank in range(3)] == [5] * 3


def test_one_that_is_killed_keeps_nobody_waiting_and_takes_nothing_back(tmp_path: Path) -> None:
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    granted = list[str]()
    for process in racing:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in racing:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert racing[0].stdout is not None
    granted.append(racing[0].stdout.readline().strip())
    racing[0].kill()
    for process in racing:
        assert process.stdout is not None
        granted += process.stdout.read().splitlines()
        process.wait(30)
    images, found = [line for line in granted if line.startswith("image")], used(tmp_path)
    assert sum(found.values()) == 20  # one may have been killed between its charge and its word
    assert all(found[name] >= images.count(f"image {name}") for name in found) and len(images) >= 19


def test_what_a_party_keeps_is_no_other_partys(tmp_path: Path) -> None:
    open_records(tmp_path, MODEL_OWNER).close()
    with pytest.raises(StorageError, match="belongs to 'model-owner', not to dealer"):
        open_records(tmp_path, DEALER)


# ---- a damaged file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The file after each of three times that hospitals were served; the last is what they used."""
    directory, found = tmp_path_factory.mktemp("records"), []
    for _ in range(3):
        with open_records(directory, MODEL_OWNER) as records:
            ledger, rate = UsageLedger(records, QUOTAS, lambda: NOW), SessionRate(records, 10**6, lambda: NOW)
            for number in range(60):
                ledger.charge(f"hospital-{number % 3}", 1 + number % 5)
                if number % 4 == 0:
                    rate.begin("hospital-1")
        found.append((directory / RECORDS_FILE).read_bytes())
    return found


def test_four_hundred_mutations_never_lower_what_was_used(files: list[bytes], tmp_path: Path) -> None:
    content, chosen = files[-1], random.Random(13)
    places = [place for place, byte in enumerate(content) if byte]  # zeros are mostly room that nothing uses
    path, refused, same = tmp_path / RECORDS_FILE, 0, 0
    path.write_bytes(content)
    expected = used(tmp_path)
    assert sum(expected.values()) == 540
    for number in range(400):
        place, kind = chosen.choice(places), number % 4
        changed = bytearray(content)
        if kind == 0:
            changed[place] ^= 1 << chosen.randrange(8)
        elif kind == 1:
            del changed[place : place + chosen.choice([1, 8, 200])]
        elif kind == 2:
            changed[place:place] = chosen.randbytes(chosen.choice([1, 8, 200]))
        else:
            changed[place : place + 16] = chosen.randbytes(len(changed[place : place + 16]))
        path.write_bytes(changed)
        try:
            assert used(tmp_path) == expected, (number, place)
            charge(tmp_path, "hospital-0", 1)
            assert used(tmp_path) == {**expected, "hospital-0": expected["hospital-0"] + 1}, (number, place)
            same += 1
        except StorageError as error:
            line = str(error)
            assert RECORDS_FILE in line and ": " in line and "\n" not in line and "defect" not in line
            refused += 1
        finally:
            path.with_name(path.name + "-journal").unlink(missing_ok=True)
    assert refused > 300 and refused + same == 400


def test_pages_that_are_lost_cut_off_exchanged_or_old_never_lower_what_was_used(
    files: list[bytes], tmp_path: Path
) -> None:
    older, newer = files[0], files[-1]
    pages = [newer[start : start + PAGE] for start in range(0, len(newer), PAGE)]
    before = [older[start : start + PAGE] for start in range(0, len(older), PAGE)]
    path = tmp_path / RECORDS_FILE
    path.write_bytes(newer)
    expected = used(tmp_path)
    mutations = [pages[:number] for number in range(len(pages))]
    for number in range(len(pages)):
        mutations.append([*pages[:number], bytes(PAGE), *pages[number + 1 :]])
        mutations.append([*pages[:number], *pages[number + 1 :]])
        mutations += [
            [*pages[:number], page, *pages[number + 1 :]] for page in before[number : number + 1]
        ]  # a lost write
        mutations += [[*pages[:number], page, *pages[number + 1 :]] for page in pages]
    for mutation in mutations:
        path.write_bytes(b"".join(mutation))
        with contextlib.suppress(StorageError):
            assert used(tmp_path) == expected
        path.with_name(path.name + "-journal").unlink(missing_ok=True)


def test_damage_while_it_serves_is_found_or_harmless(files: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / RECORDS_FILE
    path.write_bytes(files[-1])
    with open_records(tmp_path, MODEL_OWNER) as records:
        ledger = UsageLedger(records, [Quota(540, 86400.0, "24 hours", of_all=True)], lambda: NOW)
        path.write_bytes(files[0])  # an older copy
        with pytest.raises((StorageError, RefusedError)):
            ledger.charge("hospital-0", 1)


# ---- what an earlier version kept --------------------------------------------------------------------------------------------


def earlier(directory: Path, *charged: tuple[str, int], time: float = NOW) -> Path:
    for hospital, images in charged:
        append_json_line(directory / EARLIER_USAGE, {"time": time, "hospital": hospital, "images": images})
    return directory / EARLIER_USAGE


def test_usage_of_an_earlier_version_is_taken_over_once(tmp_path: Path) -> None:
    path = earlier(tmp_path, ("hospital-0", 3), ("hospital-1", 2), ("hospital-0", 1))
    content = path.read_bytes()
    path.write_bytes(content + b'{"time": 18000000')  # the crash cut a line off
    for _ in range(2):
        open_records(tmp_path, MODEL_OWNER).close()
        assert used(tmp_path) == {"hospital-0": 4, "hospital-1": 2}
    [kept] = tmp_path.glob(f"{EARLIER_USAGE}.taken-over-*")
    assert kept.read_bytes().startswith(content)
    # What is left under its name is nothing that the earlier version reads: started again, it would begin with nothing used.
    assert json.loads(path.read_text()) == {"moved to": RECORDS_FILE}
    # A crash before the file got its other name: it is the same file, and adds nothing.
    shutil.copy(kept, path)
    open_records(tmp_path, MODEL_OWNER).close()
    assert used(tmp_path) == {"hospital-0": 4, "hospital-1": 2} and json.loads(path.read_text()) == {
        "moved to": RECORDS_FILE
    }
    # Somebody removed it, and the earlier version served once more in between.
    path.unlink()
    earlier(tmp_path, ("hospital-2", 5))
    open_records(tmp_path, MODEL_OWNER).close()
    assert used(tmp_path) == {"hospital-0": 4, "hospital-1": 2, "hospital-2": 5}


def test_processes_that_take_it_over_at_once_add_nothing_twice(tmp_path: Path) -> None:
    earlier(tmp_path, *[("hospital-0", 1)] * 50)
    program = (
        "import sys; from pathlib import Path; from mpc_fl.inference.serving.service_records import open_records\n"
        "input(); open_records(Path(sys.argv[1]), 'model-owner').close()"
    )
    begun = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in begun:
        process.communicate("\n", timeout=60)
    assert [process.returncode for process in begun] == [0] * 3 and used(tmp_path) == {"hospital-0": 50}


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1, "hospital": "hospital-0", "images": -5}',
        '{"time": NaN, "hospital": "hospital-0", "images": 5}',
        '{"time": Infinity, "hospital": "hospital-0", "images": 5}',
        '{"time": 1, "hospital": "hospital-0", "images": 5.5}',
        '{"time": 1, "hospital": "hospital-0", "images": true}',
        '{"time": 1, "hospital": "hospital-0", "images": 1' + "0" * 30 + "}",
        '{"time": 1' + "0" * 400 + ', "hospital": "hospital-0", "images": 1}',
        '{"time": 1, "hospital": "hospitam-0", "images": 5}',
        '{"time": 1, "hospital": ["hospital-0"], "images": 5}',
        '{"time": 1, "images": 5}',
        "[1]",
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_file_of_an_earlier_version_frees_nobody(tmp_path: Path, line: str) -> None:
    path = earlier(tmp_path, ("hospital-0", 3))
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"usage\.jsonl is damaged: restore it; deleting it lets every hospital"):
            open_records(tmp_path, MODEL_OWNER)
    assert path.exists()


def test_a_process_of_an_earlier_version_that_still_serves_is_named(tmp_path: Path) -> None:
    earlier(tmp_path, ("hospital-0", 3))
    with (tmp_path / f"{EARLIER_USAGE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="a process of an earlier version uses .*usage.jsonl: end it"):
            open_records(tmp_path, MODEL_OWNER)
    open_records(tmp_path, MODEL_OWNER).close()
    assert used(tmp_path) == {"hospital-0": 3}


# ---- what is kept ------------------------------------------------------------------------------------------------------------


def test_what_can_count_no_more_is_forgotten_and_a_clock_that_is_put_back_frees_nothing(tmp_path: Path) -> None:
    quotas, moment = [Quota(10, 86400.0, "24 hours")], NOW
    with open_records(tmp_path, MODEL_OWNER) as records:
        ledger, rows = UsageLedger(records, quotas, lambda: moment), ChainedRows(records, USAGE)

        def kept() -> int:
            with records.reading() as transaction:
                return len(rows.read(transaction))

        for _ in range(50):  # a day each
            ledger.charge("hospital-0", 10)
            moment += 86400.0
            assert kept() <= 3
        moment -= 2 * 86400.0 - 1
        with pytest.raises(RefusedError, match="may ask about 10 images in 24 hours"):
            ledger.charge("hospital-0", 1)
    size = (tmp_path / RECORDS_FILE).stat().st_size
    assert size <= 16 * PAGE and json.dumps(used(tmp_path)) == '{"hospital-0": 30}'
