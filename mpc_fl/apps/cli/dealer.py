"""`mpc-fl dealer fill | status`: correlations made ahead, in pools that the parties keep on their disks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, Overrides, print_json, say
from mpc_fl.apps.formats import duration, size
from mpc_fl.apps.rows import PartyTraffic, read_object
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
    filling = _Filling(settings, add, pool, party, below, stays=every is not None)
    while True:
        _say_filled(filling, filling.once(), as_json)
        if every is None:
            return
        time.sleep(every)


@dataclass(frozen=True)
class _Filled:
    """Seconds of each batch that was added, None where none was; and why not, where batches were wanted."""

    seconds_per_batch: float | None
    why: str = ""


@dataclass(frozen=True)
class _Filling:
    """How the pools of `party`, or of both parties on this machine, are filled. `add` adds batches: seconds of each.

    Batches are added while fewer than `below` are left, always where that is None. One that `stays` puts up with a server
    that has no time or is away.
    """

    settings: Config
    add: Callable[[Config], float]
    pool: Path
    party: str | None
    below: int | None
    stays: bool

    def once(self) -> _Filled:
        """Add batches unless enough are left."""
        if self.below is not None and _left(self.pool, self.party) >= self.below:
            return _Filled(None)
        try:
            return _Filled(self.add(self.settings))
        except (RefusedError, PeerLostError) as error:
            if not self.stays:
                raise
            return _Filled(None, str(error))


def _say_filled(filling: _Filling, filled: _Filled, as_json: bool) -> None:
    left, count, seconds = _left(filling.pool, filling.party), filling.settings.inference.fill, filled.seconds_per_batch
    if as_json:
        halves = [asdict(half) for half in _halves(filling.pool)]
        told = {"filled": 0 if seconds is None else count, "seconds_per_batch": seconds, "left": left, "pools": halves}
        print_json({**told, "why": filled.why} if filled.why else told)
        return
    done = f"Not all added ({filled.why})" if filled.why else "Nothing added"
    done = done if seconds is None else f"Added {count}, {duration(seconds)} each"
    say(f"{done}. {left} batches are left{'' if filling.party else ' in both pools'}.")


@app.command(cls=Command)
def status(pool: PoolPath, as_json: AsJson = False) -> None:
    """Say what the pools in a directory hold: batches left and used, for whom, bytes on the disk."""
    halves = _halves(pool)
    if as_json:
        print_json({"pools": [asdict(half) for half in halves], "left": _left(pool)})
        return
    for half in halves:
        say(
            f"{half.party} with {half.counterpart}: {half.left} batches of {half.records} left, {half.used} "
            f"used; {half.reveal}; {size(half.bytes)}"
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
        return _seconds_per_batch(Path(directory) / "parties" / HOSPITAL, config)


def _fill_from_server(config: Config) -> float:
    """The same with a model owner that stays up, in this process."""
    from mpc_fl.apps.runs.party_process import run_alone
    from mpc_fl.inference.serving.client import asking_hospital

    with tempfile.TemporaryDirectory(prefix="mpc-fl-fill-") as directory:
        run_alone(asking_hospital(config), config.with_values(site={"out": directory}), lambda *_: None)
        return _seconds_per_batch(Path(directory), config)


def _seconds_per_batch(hospital: Path, config: Config) -> float:
    """From the traffic that a hospital left in its directory."""
    offline = read_object(PartyTraffic, hospital, "traffic.json").phases["offline"]
    return round(offline.seconds / config.inference.fill, 3)


@dataclass(frozen=True)
class _Half:
    """The pool of one party with its counterpart: batches of `records` images, `numbers` those that are left."""

    party: str
    counterpart: str
    pool: str
    records: int
    reveal: str
    left: int
    used: int
    numbers: list[int]
    bytes: int


def _halves(directory: Path) -> list[_Half]:
    """Each pool below a directory: of this party, or of all in a run on one machine."""
    from mpc_fl.inference.fast.preprocessing.pool import KEYS, open_pool

    halves = []
    for path in sorted(directory.glob(f"*/*/{KEYS}")):
        found = open_pool(path.parent, None)
        halves.append(
            _Half(
                party=found.terms.party,
                counterpart=found.terms.counterpart,
                pool=found.terms.pool,
                records=found.terms.records,
                reveal=found.terms.reveal,
                left=len(found.numbers),
                used=found.next,
                numbers=found.numbers,
                bytes=sum(_size(file) for file in path.parent.iterdir()),
            )
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
    numbers = [set(half.numbers) for half in halves if party in (None, half.party)]
    return len(set.intersection(*numbers)) if numbers else 0
