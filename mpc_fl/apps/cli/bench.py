"""`mpc-fl bench`: what the runtime's parts cost on this machine, beside what they replace, in the same run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.table import Table

from mpc_fl.apps.cli.options import Command, Group, print_json, print_table
from mpc_fl.roles import AGGREGATOR, Coordinator

app = typer.Typer(
    cls=Group,
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    help="Measure parts of the runtime on this machine, beside what they replace, in one run.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]


@app.command(cls=Command)
def randomness(
    seconds: Annotated[float, typer.Option(min=0.01, max=60.0, help="Time to measure each size.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Ring elements from the stream cipher beside torch.Generator, on one core."""
    from mpc_fl.apps.bench.randomness import measure_randomness

    results = measure_randomness(seconds=seconds)
    if as_json:
        print_json({"bench": "randomness", "results": [figures.to_json() for figures in results]})
        return
    table = Table(title="int64 ring elements on one core: median latency, best throughput")
    ways = ("stream cipher", "added in place", "torch.randint", "random_ in place")
    for heading in ("elements", *ways, "cipher / randint"):
        table.add_column(heading, justify="right")
    for figures in results:
        speeds = (figures.draw, figures.add, figures.randint, figures.random_)
        cells = [f"{speed.microseconds:,.0f} µs  {speed.gigabytes_per_second:5.2f} GB/s" for speed in speeds]
        table.add_row(f"{figures.elements:,}", *cells, f"{figures.ratio:.2f}")
    print_table(table)


@app.command(cls=Command)
def links(
    megabytes: Annotated[int, typer.Option(min=1, max=4096, help="Size of the tensor that is streamed.")] = 64,
    echoes: Annotated[int, typer.Option(min=1, max=100_000, help="Echoes of one element.")] = 300,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="How often the tensor is streamed.")] = 5,
    as_json: AsJson = False,
) -> None:
    """A link between two processes, direct and through a relay, beside plain gloo."""
    from mpc_fl.apps.bench.links import measure_links

    results = measure_links(megabytes, echoes, repeats)
    if as_json:
        print_json({"bench": "links", **results.to_json()})
        return
    table = Table(title=f"two processes: echo of one element (median), one-way stream of {megabytes} MB (best)")
    for heading in ("way", "encrypted, authenticated", "echo", "throughput"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, figures in results.ways.items():
        protected = "no" if way == "gloo" else "yes"
        table.add_row(way, protected, f"{figures.echo_milliseconds:.2f} ms", f"{figures.gigabytes_per_second:.2f} GB/s")
    print_table(table)


@app.command(cls=Command)
def aggregation(
    parties: Annotated[int, typer.Option(min=2, max=64, help="Number of hospitals.")] = 3,
    parameters: Annotated[int, typer.Option(min=1, help="Parameters of the model.")] = 11_178_051,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Rounds to take the median of.")] = 5,
    against: Annotated[str, typer.Option(help="crypten: the same sum in stock CrypTen as well; or none.")] = "crypten",
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="With closing masks, as below a full quorum or with the check of norms.")
    ] = False,
    coordinator: Annotated[
        Coordinator,
        typer.Option(help="none: a sum among peers, beside one with an aggregator; or aggregator: that alone."),
    ] = AGGREGATOR,
    as_json: AsJson = False,
) -> None:
    """A round of secure aggregation, beside a plain all-reduce over the same links, or another arrangement, and stock CrypTen."""
    from mpc_fl.apps.bench.aggregation import AggregationFigures, measure_aggregation
    from mpc_fl.apps.bench.peer_aggregation import FEWEST_PEERS, PeerFigures, measure_peer_aggregation

    if against not in ("crypten", "none"):
        raise typer.BadParameter("crypten or none", param_hint="--against")
    results: AggregationFigures | PeerFigures
    if coordinator == AGGREGATOR:
        results = measure_aggregation(parties, parameters, repeats, against, leave_out)
    elif parties < FEWEST_PEERS:
        raise typer.BadParameter(f"at least {FEWEST_PEERS} without a coordinator", param_hint="--parties")
    else:
        results = measure_peer_aggregation(parties, parameters, repeats, against, leave_out)
    if as_json:
        print_json({"bench": "aggregation", **results.to_json()})
        return
    table = Table(title=f"one round, {parties} hospitals, {parameters:,} parameters, one thread per party")
    for heading in ("figure", "value"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, value in results.to_json().items():
        table.add_row(name.replace("_", " "), _shown(value))
    print_table(table)


@app.command(cls=Command)
def inference(
    model: Annotated[str, typer.Option(help="A torchvision classifier by name.")] = "resnet18",
    size: Annotated[int, typer.Option(min=32, max=1024, help="Image height and width.")] = 224,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per batch.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Batches to take the median of.")] = 5,
    against: Annotated[str, typer.Option(help="crypten: run stock CrypTen in the same run; or none.")] = "crypten",
    as_json: AsJson = False,
) -> None:
    """An encrypted diagnosis by the engine `fast`, beside the plaintext network and stock CrypTen."""
    from mpc_fl.apps.bench.inference import measure_inference

    if against not in ("crypten", "none"):
        raise typer.BadParameter("crypten or none", param_hint="--against")
    baseline: Literal["crypten", "none"] = "crypten" if against == "crypten" else "none"
    results = measure_inference(model, size, batch, repeats, baseline)
    if as_json:
        print_json({"bench": "inference", **results.to_json()})
        return
    table = Table(title=f"{model}, {size} x {size}, {batch} image(s) per batch, one thread per party")
    for heading in ("figure", "value"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, value in results.to_json().items():
        if isinstance(value, (int, float, str)):
            table.add_row(name, _shown(value))
    print_table(table)


def _shown(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
