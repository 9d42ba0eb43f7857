"""Sites for tests: each with data and identity of its own, all by `mpc-fl party` in real processes under one configuration."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpc_fl.apps.cli import main as cli
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.roles import AGGREGATOR, hospital_names
from tests.support.harness import free_ports

PARTS = ("train", "test")


@dataclass(frozen=True)
class Sites:
    """Hospitals and an aggregator below `root`: each has `root`/NAME/identity, out, and hospitals their `data`."""

    root: Path
    data: Mapping[str, Path]

    @classmethod
    def of(cls, root: Path, data: Mapping[str, Path], values: dict[str, Any]) -> Sites:
        """Identities for all, and federation.yaml with `values`."""
        sites = cls(root, data)
        addresses = {
            name: f"127.0.0.1:{port}" for name, port in zip(sites.names, free_ports(len(sites.names)), strict=True)
        }
        federation = {"hospitals": len(data), "session": f"sites-{root.name}", "addresses": addresses}
        sites.configuration.write_text(yaml.safe_dump({**values, "federation": federation}))
        make_local_identities(list(sites.names), {name: root / name / "identity" for name in sites.names})
        return sites

    @property
    def hospitals(self) -> tuple[str, ...]:
        return tuple(hospital_names(len(self.data)))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.hospitals, AGGREGATOR)

    @property
    def configuration(self) -> Path:
        return self.root / "federation.yaml"

    def out(self, name: str) -> Path:
        return self.root / name / "out"

    def party(self, name: str, *more: str) -> list[str]:
        """The arguments of `mpc-fl` at a party."""
        given = ["party", name, "--config", str(self.configuration), "--identity", str(self.root / name / "identity")]
        data = ["--data", str(self.data[name])] if name in self.data else []
        return [*given, "--out", str(self.out(name)), *data, *more]

    def check(self, name: str, *more: str) -> list[str]:
        """The arguments of `mpc-fl` for a look at a hospital before a run."""
        return ["check", str(self.configuration), "--data", str(self.data[name]), "--party", name, *more]

    def run_all(self, more: Mapping[str, Sequence[str]] | None = None) -> dict[str, subprocess.CompletedProcess[str]]:
        """Start all parties, `more` arguments at some, and wait until they have ended."""
        started = {
            name: subprocess.Popen(
                [sys.executable, "-m", "mpc_fl", *self.party(name, *(more or {}).get(name, ()))],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for name in self.names
        }  # fmt: skip
        ended = {}
        try:
            for name, process in started.items():
                said = process.communicate(timeout=300)
                ended[name] = subprocess.CompletedProcess(process.args, process.returncode, *said)
        finally:
            for process in started.values():
                process.kill()
                process.wait(timeout=30)
        return ended

    def summary(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out(name) / "summary.json").read_text())
        return found

    def report(self, name: str) -> str:
        """The text of a report, without its pictures and figures."""
        text = re.sub(r"<(style|svg)\b.*?</\1>", " ", (self.out(name) / "report.html").read_text(), flags=re.DOTALL)
        return " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())


def said_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> tuple[int, str, str]:
    """Status of `mpc-fl` with these arguments, run in this process, and what it wrote to its two outputs."""
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), *capsys.readouterr()


def require_reported_as_checked(summary: dict[str, Any], checked: dict[str, Any]) -> None:
    """Fail where the summary of a hospital's run says another figure than `mpc-fl check --json` said before it."""
    of = checked["data"]
    assert {part: counts["patients"] for part, counts in of["parts"].items()} == summary["patients"]
    assert {part: counts["records"] for part, counts in of["parts"].items()} == summary["records"]
    assert {part: counts["class_counts"] for part, counts in of["parts"].items()} == summary["class_counts"]
    assert of["treatments"] == summary["treatments"] and of["left_aside"] == summary["left_aside"]
    assert of["unreadable"] == summary["skipped_files"] and of["unit"] == summary["unit"]
    assert of["records"] == sum(summary["records"].values()) + summary["skipped_files"]
    assert checked["privacy"][0]["patients"] == summary["patients"]["train"]
