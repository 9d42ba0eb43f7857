"""Counters of a machine's energy: read as they are, also where they begin again, and not at all where one cannot be read."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.package_energy import _keep_reading, busy_seconds, package_energy, share_of

RANGE = 1_000_000_000


def zone(root: Path, place: str, name: str, microjoules: int | str = 0) -> Path:
    """A counter as Linux shows it; returns the file that counts."""
    directory = root / place
    directory.mkdir(parents=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (directory / "energy_uj").write_text(f"{microjoules}\n")
    return directory / "energy_uj"


def test_packages_and_their_memory_are_added_up_and_nothing_twice(tmp_path: Path) -> None:
    files = [
        zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1"),
        zone(tmp_path, "intel-rapl:0:1", "dram"),
    ]
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core"),  # is in its package
        zone(tmp_path, "intel-rapl:2", "psys"),  # is more than the processors
        zone(tmp_path, "intel-rapl-mmio:0", "package-0"),  # the same counter once more
    ]
    energy = package_energy(tmp_path)
    assert energy is not None and energy.joules() == 0.0
    for file, microjoules in zip(files, (6_000_000, 2_000_000, 500_000), strict=True):
        file.write_text(str(microjoules))
    for file in others:
        file.write_text("900000000")
    assert energy.joules() == pytest.approx(1 + 2 + 0.5)
    assert energy.joules() == pytest.approx(3.5)


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 3_000_000)
    energy = package_energy(tmp_path)
    assert energy is not None
    file.write_text("4000000")
    assert energy.joules() == pytest.approx(7.0)
    file.write_text("3999999")  # nearly the whole range on
    assert energy.joules() == pytest.approx(7.0 + RANGE / 1e6, abs=1e-5)


def test_who_has_no_counters_or_may_not_read_one_measures_nothing(tmp_path: Path) -> None:
    assert package_energy(tmp_path / "absent") is None
    zone(tmp_path / "memory", "intel-rapl:0:1", "dram")
    assert package_energy(tmp_path / "memory") is None
    for name in ("name", "energy_uj", "max_energy_range_uj"):
        zone(tmp_path / name, "intel-rapl:0", "package-0")
        file = zone(tmp_path / name, "intel-rapl:1", "package-1").parent / name
        assert package_energy(tmp_path / name) is not None
        file.unlink()
        file.mkdir()  # also root cannot read it
        assert package_energy(tmp_path / name) is None
    zone(tmp_path / "text", "intel-rapl:0", "package-0", "none")
    assert package_energy(tmp_path / "text") is None


def test_a_counter_that_can_be_read_no_more_ends_the_measurement_for_good(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0")
    energy = package_energy(tmp_path)
    assert energy is not None and energy.joules() == 0.0
    file.write_text("")
    assert energy.joules() is None
    file.write_text("7")
    assert energy.joules() is None
    _keep_reading(weakref.ref(energy), threading.Event(), 0.0)  # ends, since there is nothing to read


def test_nobody_reads_on_for_a_measurement_that_is_over(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    energy = package_energy(tmp_path)
    assert energy is not None
    ended, kept = energy._ended, weakref.ref(energy)
    del energy
    assert ended.wait(60) and kept() is None
    _keep_reading(kept, threading.Event(), 0.0)


def test_busy_seconds_are_those_of_work(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text("cpu  100 20 30 4000 500 6 7 800 90 9\ncpu0 1 2 3\n")
    assert busy_seconds(path, ticks=100) == pytest.approx(1.63)  # not idle, iowait, stolen; guests are in user and nice
    for text in ("", "cpu 1 2\n", "cpu a b c d e f g h\n"):
        path.write_text(text)
        assert busy_seconds(path) is None
    assert busy_seconds(tmp_path / "absent") is None


@given(
    st.floats(0, 1e6),
    st.lists(st.floats(0, 1e4), min_size=1, max_size=6),
    st.floats(0, 1e4),
)
def test_shares_of_all_processes_are_what_was_counted(joules: float, own: list[float], others: float) -> None:
    busy = sum(own) + others
    shares = [share_of(joules, seconds, busy) for seconds in own]
    assert all(0 <= share <= joules * (1 + 1e-9) for share in shares)
    assert sum(shares) + share_of(joules, others, busy) == pytest.approx(joules if busy else 0.0, rel=1e-6, abs=1e-6)
    assert share_of(joules, 2.0, 1.0) == joules  # ticks: nobody is given more than there was
