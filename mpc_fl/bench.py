"""`mpc-fl bench`: what the runtime's parts cost on this machine, beside what they replace, in the same run."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True, help="Measure parts of the runtime on this machine, beside what they replace, in one run."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 132).print(table)


@app.command()
def randomness(
    seconds: Annotated[float, typer.Option(min=0.01, max=60.0, help="Time to measure each size.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Ring elements from the stream cipher beside torch.Generator, on one core."""
    from mpc_fl.bench_randomness import measure_randomness

    results = measure_randomness(seconds=seconds)
    if as_json:
        _print_json({"bench": "randomness", "results": results})
        return
    table = Table(title="int64 ring elements on one core: median latency, best throughput")
    ways = {"draw": "stream cipher", "add": "added in place", "randint": "torch.randint", "random_": "random_ in place"}
    for heading in ("elements", *ways.values(), "cipher / randint"):
        table.add_column(heading, justify="right")
    for entry in results:
        cells = [
            f"{entry[way]['microseconds']:,.0f} µs  {entry[way]['gigabytes_per_second']:5.2f} GB/s" for way in ways
        ]
        table.add_row(f"{entry['elements']:,}", *cells, f"{entry['ratio']:.2f}")
    _print_table(table)


@app.command()
def links(
    megabytes: Annotated[int, typer.Option(min=1, max=4096, help="Size of the tensor that is streamed.")] = 64,
    echoes: Annotated[int, typer.Option(min=1, max=100_000, help="Echoes of one element.")] = 300,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="How often the tensor is streamed.")] = 5,
    as_json: AsJson = False,
) -> None:
    """A link between two processes, direct and through a relay, beside plain gloo."""
    from mpc_fl.bench_links import measure_links

    results = measure_links(megabytes, echoes, repeats)
    if as_json:
        _print_json({"bench": "links", **results})
        return
    table = Table(title=f"two processes: echo of one element (median), one-way stream of {megabytes} MB (best)")
    for heading in ("way", "encrypted, authenticated", "echo", "throughput"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, figures in results["ways"].items():
        protected = "no" if way == "gloo" else "yes"
        table.add_row(
            way, protected, f"{figures['echo_milliseconds']:.2f} ms", f"{figures['gigabytes_per_second']:.2f} GB/s"
        )
    _print_table(table)
