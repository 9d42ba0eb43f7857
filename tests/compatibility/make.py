"""Makes the golden files of commit b39b263: runs with the code of that commit, not with today's.

    git worktree add OLD b39b263 && make -C OLD install
    PYTHONPATH=OLD OLD/.venv/bin/python tests/compatibility/make.py FILES.tar.xz

Everything is made by the programs that a user runs, in real processes, from synthetic phantoms. One thing is changed:
certificates of local runs live a hundred years instead of a day, so that the tests hold as long. Keys in the archive belong
to nobody.
"""

from __future__ import annotations

import functools
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mpc_fl.authority import make_local_identities
from mpc_fl.phantoms import public_phantoms
from mpc_fl.weights import load_model

from mpc_fl import launcher, run
from mpc_fl.config import AGGREGATOR, Config, parse_config
from mpc_fl.federation import predict

YEARS_100 = 24.0 * 36500
DAYS_100 = "36500"
PASSPHRASE = "a passphrase of no secrecy"
CONFIGURATION = {
    "name": "golden",
    "seed": 11,
    "data": {
        "source": "phantoms",
        "classes": ["normal", "bacterial", "viral"],
        "image_size": 8,
        "channels": 1,
        "phantoms": {"train_patients": 60, "test_patients": 24},
    },
    "model": {"architecture": "small_cnn"},
    "training": {"rounds": 2, "local_steps": 2, "batch_size": 8, "learning_rate": 0.05},
    "privacy": {"epsilon": 8.0, "delta": 1e-3},
    "federation": {"hospitals": 3, "quorum": 2},
    "inference": {"limit": 2, "plaintext_reference": True},
}


class Interrupt(BaseException):
    """As Ctrl-C: the launcher ends all parties and keeps what it takes to go on."""


def silent(*_progress: Any) -> None:
    """Nobody watches."""


def training_run(config: Config, out: Path) -> None:
    run.train(config, out, "mpc-fl train golden.yaml --out run", silent)


def interrupted_run(config: Config, out: Path) -> None:
    """A run of three rounds that ended after its first: `out`.failed holds it."""

    def interrupt(*_progress: Any) -> None:
        partial = out.with_name(out.name + ".partial")
        if (partial / "parties" / AGGREGATOR / "checkpoint-1.safetensors").exists():
            raise Interrupt

    try:
        run.train(config.with_values(training={"rounds": 3}), out, "mpc-fl train golden.yaml --out run", interrupt)
    except Interrupt:
        return
    raise SystemExit("the run ended before it was interrupted")


def diagnosis(config: Config, model: Path, out: Path) -> None:
    config = config.with_values(site={"model": str(model)}, inference={"engine": "fast"})
    run.infer(config, out, "mpc-fl infer golden.yaml --model run/model.safetensors --out diagnosis", silent)


def mpc_fl(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "mpc_fl.cli", *map(str, arguments)], check=True, timeout=200)


def authority(directory: Path, passphrase: Path) -> None:
    """An authority with two members, one of which it revoked."""
    sealed = ("--passphrase-file", passphrase)
    mpc_fl("pki", "init", directory, "--name", "golden federation", "--days", DAYS_100, *sealed)
    for name in ("hospital-0", "hospital-1"):
        mpc_fl("pki", "issue", directory, name, "--days", DAYS_100, *sealed)
    mpc_fl("pki", "revoke", directory, "hospital-1", *sealed)


def service(config: Config, model: Path, directory: Path, scratch: Path) -> None:
    """What a model owner that stays up keeps of a hospital that asked twice: its usage ledger."""
    (scratch / "service.yaml").write_text(config.to_yaml())
    serving = [sys.executable, "-m", "mpc_fl.cli", "serve", scratch / "service.yaml", "--model", model]
    served = scratch / "service"
    command = [*map(str, serving), "--set", "inference.engine=fast", "--out", str(served)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stdout.readline().startswith("Ask with")
            for visit in range(2):
                identity = served / "parties" / "hospital-0" / "identity"
                mpc_fl("infer", served / "federation.yaml", "--identity", identity, "--out", scratch / f"asked-{visit}")
        finally:
            server.terminate()
            server.wait(60)
    directory.mkdir()
    [usage] = served.rglob("usage.jsonl")
    shutil.copy(usage, directory)


def pool(config: Config, model: Path, directory: Path, scratch: Path) -> None:
    (scratch / "pool.yaml").write_text(config.to_yaml())
    filling = ("--count", 2, "--model", model, "--pool", directory)
    mpc_fl("dealer", "fill", scratch / "pool.yaml", *filling)


def logits(config: Config, model: Path, out: Path) -> None:
    """What the model says of fixed images, and these images."""
    images = public_phantoms(3, config)
    said = predict(load_model(model, config), images)
    out.write_text(json.dumps({"images": images.tolist(), "logits": said.tolist()}))


def without_what_is_not_needed(made: Path) -> None:
    """Reports are large and written again by the test; locks are empty; a run goes on from its last checkpoint alone."""
    first = made / "interrupted.failed" / "parties" / AGGREGATOR / "checkpoint-0.safetensors"
    for path in [*made.rglob("report.html"), *made.rglob("*.lock"), first]:
        path.unlink()


def archive(made: Path, out: Path) -> None:
    """One file, the same for the same content: names in order, no owner, no time; modes stay, keys are 0600."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(made.rglob("*")):
            entry = tar.gettarinfo(path, str(path.relative_to(made)))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") if path.is_file() else io.BytesIO() as content:
                tar.addfile(entry, content if path.is_file() else None)
    out.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    launcher.make_local_identities = functools.partial(make_local_identities, hours=YEARS_100)
    config = parse_config(CONFIGURATION, "golden")
    with tempfile.TemporaryDirectory() as directory:
        made, scratch = Path(directory) / "made", Path(directory) / "scratch"
        made.mkdir()
        scratch.mkdir()
        passphrase = scratch / "passphrase"
        passphrase.touch(0o600)
        passphrase.write_text(PASSPHRASE)
        began = time.monotonic()
        training_run(config, made / "run")
        model = made / "run" / "model.safetensors"
        interrupted_run(config, made / "interrupted")
        diagnosis(config, model, made / "diagnosis")
        authority(made / "authority", passphrase)
        service(config, model, made / "service", scratch)
        pool(config, model, made / "pool", scratch)
        logits(config, model, made / "logits.json")
        without_what_is_not_needed(made)
        archive(made, out)
        sys.stdout.write(f"{out}: {out.stat().st_size} bytes, {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
