"""Energy that the processors of this machine have used, where the machine counts it and lets this user read it.

Linux shows the counters of Intel's and AMD's RAPL (running average power limit) below /sys/class/powercap: a directory for each
package of a machine and for its memory, `energy_uj` in microjoules, which begins again at 0 behind `max_energy_range_uj`. Since
2020 (CVE-2020-8694) root alone may read them, unless a site allows it. They count the whole machine; `share_of` is what of it
falls to one process.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
STATISTICS = Path("/proc/stat")
_BEGIN_ANEW = 60.0  # seconds between readings: in these no counter comes round twice, at less than 1 kW and 65 kJ
_PER_JOULE = 1e6
_BUSY = (1, 2, 3, 6, 7)  # user, nice, system, irq, softirq in a line of /proc/stat; not idle, iowait, stolen


@dataclass
class _Zone:
    """One counter, and what it showed last."""

    file: Path
    range: int
    last: int

    def step(self) -> int:
        """Microjoules since it was read last. Raises `OSError` or `ValueError` where it cannot be read."""
        now = int(self.file.read_text())
        step = now - self.last + (self.range if now < self.last else 0)
        self.last = now
        return step


class PackageEnergy:
    """Joules of all packages and their memory since it was made; read now and then, so that no counter comes round unseen."""

    def __init__(self, zones: list[_Zone], every: float = _BEGIN_ANEW) -> None:
        self._zones, self._microjoules, self._lock = zones, 0, threading.Lock()
        self._lost, self._ended = False, threading.Event()
        weakref.finalize(self, self._ended.set)
        threading.Thread(target=_keep_reading, args=(weakref.ref(self), self._ended, every), daemon=True).start()

    def joules(self) -> float | None:
        """So far; from the first time on that a counter could not be read it is None."""
        with self._lock:
            try:
                if not self._lost:
                    self._microjoules += sum(zone.step() for zone in self._zones)
            except (OSError, ValueError):
                self._lost = True
            return None if self._lost else self._microjoules / _PER_JOULE


def _keep_reading(energy: weakref.ref[PackageEnergy], ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        found = energy()
        if found is None or found.joules() is None:
            return
        del found


def package_energy(root: Path = POWERCAP) -> PackageEnergy | None:
    """The counters of this machine; None where there is none of a package, or this user may not read all of them."""
    zones, packages = list[_Zone](), 0
    try:
        for zone in sorted(root.glob("intel-rapl:*")):  # intel-rapl-mmio: has the same ones once more
            name = (zone / "name").read_text().strip()
            if name.startswith("package-") or name == "dram":
                packages += name != "dram"
                file, longest = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
                zones.append(_Zone(file, longest, int(file.read_text())))
    except (OSError, ValueError):
        return None
    return PackageEnergy(zones) if packages else None


def busy_seconds(statistics: Path = STATISTICS, ticks: int = 100) -> float | None:
    """Seconds that all processors of this machine have worked since it started, for whomever; None where nothing says so."""
    try:
        with statistics.open(encoding="ascii") as lines:
            columns = lines.readline().split()
        return sum(int(columns[column]) for column in _BUSY) / ticks
    except (OSError, ValueError, LookupError):
        return None


def share_of(joules: float, own: float, busy: float) -> float:
    """What of a machine's joules in a while falls to a process that had `own` of the `busy` seconds of all its processors.

    So what the machine draws while it waits falls to who works on it, and what falls to all together is what was counted. Both
    are counted in ticks, so that a process may seem to have worked longer than all: then all is its own.
    """
    return joules * (own / max(own, busy)) if own > 0 else 0.0
