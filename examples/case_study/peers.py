"""Hospitals that train without an aggregator, each by `mpc-fl party` on its own films: one joins while they train, one leaves.

    python examples/case_study/peers.py --config FILE --sites DIR --out DIR --join-after 1 --leave-after 10 --set a.b=c

DIR/hospital-<n>/{train,test}/<class>/ for each of federation.hospitals; all but the last are founders, and the last one is
started when the first has made so many rounds. The second says after the round --leave-after that it leaves. Certificates are
those of an authority that is forgotten at once. At the end the ledger of those that stayed is verified, and OUT/membership.json
says who was in which round, what accuracy was opened, who joined and left by the blocks that all signed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.errors import MpcFlError
from mpc_fl.files import OTHERS_MAY_NOTHING, read_json_lines, write_json, write_text
from mpc_fl.roles import hospital_names

_LEAVER = 1
_POLL_SECONDS, _DEADLINE_SECONDS, _ENDING_SECONDS = 0.2, 7200.0, 30.0
_JOINED, _LEFT = "Joined: ", "Left, as it said: "


class Hospitals:
    """The processes of one run, below `out`; whatever happens, they are ended."""

    def __init__(self, out: Path, sites: Path, addresses: dict[str, str]) -> None:
        self._out, self._sites, self._addresses = out, sites, addresses
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *more: str) -> None:
        """Start one, with more arguments for `mpc-fl party`."""
        command = ["party", name, "--config", str(self._out / "federation.yaml"), "--data", str(self._sites / name)]
        command += ["--identity", str(self.identity(name)), "--out", str(self.directory(name)), *more]
        with self.said(name).open("wb") as said:
            words = [sys.executable, "-m", "mpc_fl", *command]
            self._processes[name] = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)

    def directory(self, name: str) -> Path:
        """What a hospital writes to."""
        return self._out / "run" / "parties" / name

    def identity(self, name: str) -> Path:
        """Where a hospital's key and certificate are."""
        return self._out / "identities" / name

    def said(self, name: str) -> Path:
        """What a hospital said."""
        return self._out / f"{name}.txt"

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """The rounds that a hospital has made."""
        return read_json_lines(self.directory(name) / "rounds.jsonl")

    def wait_for_round(self, name: str, number: int) -> None:
        """Until a hospital has made a round, or does not run any more."""
        began = time.monotonic()
        while self._processes[name].poll() is None and time.monotonic() - began < _DEADLINE_SECONDS:
            if any(line["round"] >= number for line in self.rounds(name)):
                return
            time.sleep(_POLL_SECONDS)
        raise MpcFlError(f"{name} made no round {number}: {self.last_words(name)}", f"see {self.said(name)}")

    def wait(self, names: list[str]) -> dict[str, int]:
        """The exit status of each, when all have ended."""
        until = time.monotonic() + _DEADLINE_SECONDS
        return {name: self._processes[name].wait(max(0.0, until - time.monotonic())) for name in names}

    def last_words(self, name: str) -> str:
        """The last line that a hospital said."""
        lines = self.said(name).read_text("utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """End those that still run."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_SECONDS)
            process.kill()
            process.wait()


@contextlib.contextmanager
def hospitals_of(out: Path, sites: Path, addresses: dict[str, str]) -> Iterator[Hospitals]:
    """Hospitals that are ended with the block."""
    hospitals = Hospitals(out, sites, addresses)
    try:
        yield hospitals
    finally:
        hospitals.end()
        shutil.rmtree(out / "identities", ignore_errors=True)  # keys are of this run alone


def rounds_told(blocks: list[dict[str, Any]], what: str) -> dict[str, str]:
    """Of whom a block tells that it joined or left, and what that block is about."""
    found = dict[str, str]()
    for block in blocks:
        for line in block["told"]:
            if line.startswith(what):
                found |= dict.fromkeys(line.removeprefix(what).split(", "), block["about"])
    return found


def command_output(*arguments: str) -> str:
    """What a command of the product prints. Raises `MpcFlError` where it fails."""
    done = subprocess.run([sys.executable, "-m", "mpc_fl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MpcFlError(f"mpc-fl {arguments[0]} {arguments[1]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; what membership.json holds. Raises `MpcFlError` where founders that stay do not come to the end."""
    out = options.out
    seats = load_config(options.config, [*options.set, "federation.coordinator=none"]).federation.hospitals
    names, newcomer = hospital_names(seats), hospital_names(seats)[-1]
    founders, leaver = names[:-1], names[_LEAVER]
    addresses = local_addresses(names, None)
    federation = {"coordinator": "none", "session": secrets.token_hex(16), "evaluate_incomplete": True}
    federation["addresses"] = {name: addresses[name] for name in founders}
    config = load_config(options.config, [*options.set, *_as_overrides(federation), "evaluation.every=1", "task=train"])
    write_text(out / "federation.yaml", yaml.safe_dump(config.model_dump(mode="json", exclude={"site"})))
    with hospitals_of(out, options.sites, addresses) as hospitals:
        make_local_identities(names, {name: hospitals.identity(name) for name in names})
        for name in founders:
            hospitals.start(name, *(("--leave-after", str(options.leave_after)) if name == leaver else ()))
        if options.join_after:
            hospitals.wait_for_round(founders[0], options.join_after)
        hospitals.start(newcomer, "--set", f"site.address={addresses[newcomer]}")
        ended = hospitals.wait(founders)
        failed = [name for name, status in ended.items() if status]
        if failed:
            raise MpcFlError(
                f"{failed[0]} failed: {hospitals.last_words(failed[0])}", f"see {hospitals.said(failed[0])}"
            )
        joined = any(newcomer in line["hospitals"] for line in hospitals.rounds(founders[0]))
        if joined:  # else it waits for members that have ended
            ended |= hospitals.wait([newcomer])
        authority = str(hospitals.identity(founders[0]) / ROOT_FILE)
        command_output("ledger", "verify", str(out / "run"), "--authority", authority)
        blocks = json.loads(command_output("ledger", "show", str(out / "run"), "--json"))["blocks"]
        models = {(hospitals.directory(name) / "model.safetensors").read_bytes() for name in founders if name != leaver}
        rounds = hospitals.rounds(founders[0])
    return {
        "hospitals": names,
        "newcomer": newcomer,
        "leaver": leaver,
        "joined": rounds_told(blocks, _JOINED),
        "left": rounds_told(blocks, _LEFT),
        "one_model": len(models) == 1,
        "blocks": len(blocks),
        "statuses": ended,
        "rounds": rounds,
    }


def _as_overrides(federation: dict[str, Any]) -> list[str]:
    return [f"federation.{key}={json.dumps(value)}" for key, value in federation.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--sites", type=Path, required=True, help="DIR with hospital-<n>/{train,test}/<class>/")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--join-after", type=int, default=1, metavar="ROUND", help="when the last hospital is started")
    parser.add_argument("--leave-after", type=int, required=True, metavar="ROUND", help="when the second one leaves")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of all hospitals")
    options = parser.parse_args()
    os.umask(OTHERS_MAY_NOTHING)
    try:
        options.out.mkdir(parents=True)
        write_json(options.out / "membership.json", run(options))
    except (MpcFlError, OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"peers.py: {error}") from None


if __name__ == "__main__":
    main()
