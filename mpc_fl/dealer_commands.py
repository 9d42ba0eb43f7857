"""`mpc-fl dealer fill | status`: correlations made ahead, in pools that the parties keep on their disks."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mpc_fl.config import Config, load_config
from mpc_fl.errors import ConfigError

app = typer.Typer(
    name="dealer",
    no_args_is_help=True,
    add_completion=False,
    help="""Make correlated randomness ahead of diagnoses.

    A batch from a pool needs no dealer while the patient waits. Pools are
    encrypted, every batch is used once, the dealer keeps nothing.
    """,
)

PoolPath = Annotated[Path, typer.Option("--pool", metavar="DIR", help="Directory of the pools, one in it per party.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]


@app.command()
def fill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration of the diagnoses to come.")],
    model: Annotated[Path, typer.Option(help="model.safetensors; the model owner's secret.")],
    count: Annotated[int, typer.Option(min=1, help="Batches to add, of inference.batch_size images each.")],
    pool: PoolPath,
    below: Annotated[
        int | None, typer.Option(min=1, help="Add them only while fewer batches than this are left.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Stay, and look again after so many seconds.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fill the pools of a hospital and a model owner on this machine, with a dealer: three processes.

    Then mpc-fl infer CONFIG --set site.pool=DIR takes batches from them. With
    --below and --every it keeps them filled in the background: diagnoses
    may go on meanwhile. On several machines run mpc-fl party at each, with
    task=infer, inference.engine=fast, inference.fill=N and site.pool=DIR.
    """
    if every is not None and below is None:
        raise ConfigError("--every would add batches without end", "say with --below when there are enough")
    values: dict[str, Any] = {"engine": "fast", "fill": count, "dealer": True}
    site = {"model": str(model.absolute()), "pool": str(pool.absolute())}
    settings = load_config(config, overrides).with_values(task="infer", inference=values, site=site)
    while True:
        seconds = _fill(settings) if below is None or _left(pool) < below else None  # of each batch
        halves = _halves(pool)
        if as_json:
            filled = 0 if seconds is None else count
            _say(json.dumps({"filled": filled, "seconds_per_batch": seconds, "left": _left(pool), "pools": halves}))
        else:
            done = "Nothing added" if seconds is None else f"Added {count}, {seconds:.2f} s each"
            _say(f"{done}. {_left(pool)} batches are left in both pools.")
        if every is None:
            return
        time.sleep(every)


@app.command()
def status(pool: PoolPath, as_json: AsJson = False) -> None:
    """Say what the pools in a directory hold: batches left and used, for whom, bytes on the disk."""
    halves = _halves(pool)
    if as_json:
        _say(json.dumps({"pools": halves, "left": _left(pool)}))
        return
    for half in halves:
        _say(
            f"{half['party']} with {half['counterpart']}: {half['left']} batches of {half['records']} left, {half['used']} "
            f"used; {half['reveal']}; {half['bytes'] / 1e6:,.1f} MB"
        )
    if not halves:
        _say(f"There is no pool in {pool}.")


def _fill(config: Config) -> float:
    """Seconds per batch, from the dealer's work to both disks."""
    from mpc_fl.diagnosis import HOSPITAL, require_supported
    from mpc_fl.launcher import launch
    from mpc_fl.weights import load_model

    assert config.site.model is not None
    require_supported(config, load_model(config.site.model, config))
    with tempfile.TemporaryDirectory(prefix="mpc-fl-fill-") as directory:
        launch(config, Path(directory), lambda *_: None)
        traffic = json.loads((Path(directory) / "parties" / HOSPITAL / "traffic.json").read_text())
    return round(traffic["phases"]["offline"]["seconds"] / config.inference.fill, 3)


def _halves(directory: Path) -> list[dict[str, Any]]:
    """Each pool below a directory: of this party, or of all in a run on one machine."""
    from mpc_fl.fast.pool import KEYS, open_pool

    halves = []
    for path in sorted(directory.glob(f"*/*/{KEYS}")):
        found = open_pool(path.parent, None)
        halves.append(
            {
                "party": found.terms.party,
                "counterpart": found.terms.counterpart,
                "pool": found.terms.pool,
                "records": found.terms.records,
                "reveal": found.terms.reveal,
                "left": len(found.numbers),
                "used": found.next,
                "numbers": found.numbers,
                "bytes": sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file()),
            }
        )
    return halves


def _left(directory: Path) -> int:
    """Batches that every half has."""
    numbers = [set(half["numbers"]) for half in _halves(directory)]
    return len(set.intersection(*numbers)) if numbers else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
