"""`mpc-fl dealer fill | status`: correlations made ahead, in pools that the parties keep on their disks."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, Overrides, print_json, say
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError, PeerLostError, RefusedError

app = typer.Typer(
    cls=Group,
    name="dealer",
    no_args_is_help=True,
    add_completion=False,
    help="""Make correlated randomness ahead of diagnoses.

    A batch from a pool needs no dealer while the patient waits. Pools are
    encrypted, every batch is used once, the dealer keeps nothing.
    """,
)

PoolPath = Annotated[Path, typer.Option("--pool", metavar="DIR", help="Directory of the pools, one in it per party.")]


@app.command(cls=Command)
def fill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration of the diagnoses to come.")],
    count: Annotated[int, typer.Option(min=1, help="Batches to add, of inference.batch_size images each.")],
    pool: PoolPath,
    model: Annotated[Path | None, typer.Option(help="model.safetensors; the model owner's secret.")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="This hospital's key and certificate, to fill its pool with a server.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Model owner that stays up (mpc-fl serve).")
    ] = None,
    dealer: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The server's dealer.")] = None,
    below: Annotated[
        int | None, typer.Option(min=1, help="Add them only while fewer batches than this are left.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Stay, and look again after so many seconds.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Fill the pools of a hospital and a model owner on this machine, with a dealer: three processes.

    Then mpc-fl infer CONFIG --set site.pool=DIR takes batches from them. With
    --below and --every it keeps them filled in the background, until Ctrl-C:
    diagnoses may go on meanwhile. On several machines run mpc-fl party at each,
    with task=infer, inference.engine=fast, inference.fill=N and site.pool=DIR.

    With --identity this process is a hospital alone: it fills its pool, and the
    one that a model owner that stays up (mpc-fl serve) keeps for it. Addresses
    that --server and --dealer do not give are those in federation.addresses.
    """
    from mpc_fl.inference.serving.client import asking, asking_hospital

    if every is not None and below is None:
        raise ConfigError("--every would add batches without end", "say with --below when there are enough")
    values: dict[str, Any] = {"engine": "fast", "fill": count, "dealer": True}
    settings = load_config(config, overrides).with_values(inference=values, site={"pool": str(pool.absolute())})
    party: str | None = None
    if identity is not None or server is not None or dealer is not None:
        if model is not None:
            raise ConfigError("the model is the server's", "leave --model out to fill with a server")
        site = {} if identity is None else {"identity": str(identity.absolute())}
        settings = asking(settings.with_values(task="serve", site=site), server, dealer)
        party, add = asking_hospital(settings), _fill_from_server
    elif model is None:
        raise ConfigError("no model was given", "pass --model FILE, or --identity DIR to fill with a server")
    else:
        settings, add = settings.with_values(task="infer", site={"model": str(model.absolute())}), _fill
    while True:
        _look(settings, add, below, pool, party, as_json, every is not None)
        if every is None:
            return
        time.sleep(every)


def _look(
    settings: Config,
    add: Callable[[Config], float],
    below: int | None,
    pool: Path,
    party: str | None,
    as_json: bool,
    stays: bool,
) -> None:
    """Add batches unless enough are left, and say so. One that stays puts up with a server that has no time or is away."""
    seconds: float | None = None
    why, before = "", _left(pool, party)
    if below is None or before < below:
        try:
            seconds = add(settings)  # of each batch
        except (RefusedError, PeerLostError) as error:
            if not stays:
                raise
            why = str(error)
    left, count = _left(pool, party), settings.inference.fill
    if as_json:
        filled = 0 if seconds is None else count
        told = {"filled": filled, "seconds_per_batch": seconds, "left": left, "pools": _halves(pool)}
        print_json({**told, "why": why} if why else told)
        return
    done = f"Not all added ({why})" if why else "Nothing added"
    done = done if seconds is None else f"Added {count}, {seconds:.2f} s each"
    say(f"{done}. {left} batches are left{'' if party else ' in both pools'}.")


@app.command(cls=Command)
def status(pool: PoolPath, as_json: AsJson = False) -> None:
    """Say what the pools in a directory hold: batches left and used, for whom, bytes on the disk."""
    halves = _halves(pool)
    if as_json:
        print_json({"pools": halves, "left": _left(pool)})
        return
    for half in halves:
        say(
            f"{half['party']} with {half['counterpart']}: {half['left']} batches of {half['records']} left, {half['used']} "
            f"used; {half['reveal']}; {half['bytes'] / 1e6:,.1f} MB"
        )
    if not halves:
        say(f"There is no pool in {pool}.")


def _fill(config: Config) -> float:
    """Seconds per batch, from the dealer's work to both disks."""
    from mpc_fl.apps.runs.launcher import launch
    from mpc_fl.inference.diagnosis import require_supported
    from mpc_fl.learning.models.model_file import load_model
    from mpc_fl.roles import HOSPITAL

    assert config.site.model is not None
    require_supported(config, load_model(config.site.model, config))
    with tempfile.TemporaryDirectory(prefix="mpc-fl-fill-") as directory:
        launch(config, Path(directory), lambda *_: None)
        traffic = json.loads((Path(directory) / "parties" / HOSPITAL / "traffic.json").read_text())
    return _seconds_per_batch(traffic, config)


def _fill_from_server(config: Config) -> float:
    """The same with a model owner that stays up, in this process."""
    from mpc_fl.apps.runs.party_process import run_alone
    from mpc_fl.inference.serving.client import asking_hospital

    with tempfile.TemporaryDirectory(prefix="mpc-fl-fill-") as directory:
        run_alone(asking_hospital(config), config.with_values(site={"out": directory}), lambda *_: None)
        return _seconds_per_batch(json.loads((Path(directory) / "traffic.json").read_text()), config)


def _seconds_per_batch(traffic: dict[str, Any], config: Config) -> float:
    return round(traffic["phases"]["offline"]["seconds"] / config.inference.fill, 3)


def _halves(directory: Path) -> list[dict[str, Any]]:
    """Each pool below a directory: of this party, or of all in a run on one machine."""
    from mpc_fl.inference.fast.preprocessing.pool import KEYS, open_pool

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
                "bytes": sum(_size(file) for file in path.parent.iterdir()),
            }
        )
    return halves


def _size(file: Path) -> int:
    """Bytes; none of a record that was used meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _left(directory: Path, party: str | None = None) -> int:
    """Batches that every half has, or that of one party."""
    halves = _halves(directory)
    numbers = [set(half["numbers"]) for half in halves if party in (None, half["party"])]
    return len(set.intersection(*numbers)) if numbers else 0
