"""`mpc-fl simulate`: the rounds of many hospitals in a few processes, for research."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.options import (
    AsJson,
    ConfigPath,
    DataPath,
    FromModel,
    OutPath,
    Overrides,
    command_line,
    configure,
    print_json,
    say,
    say_skipped,
)
from mpc_fl.apps.cli.progress import shown_progress

if TYPE_CHECKING:
    from mpc_fl.apps.summaries import TrainingSummary


def simulate(
    config: ConfigPath,
    out: OutPath,
    hospitals: Annotated[
        int | None, typer.Option(min=2, max=1000, help="How many; by default as federation.hospitals says.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the hospitals; by default one for each processor.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of a Ray cluster that runs already; 'auto' finds one here.")
    ] = None,
    data: DataPath = None,
    overrides: Overrides = None,
    from_model: FromModel = None,
    as_json: AsJson = False,
) -> None:
    """Simulate training with many hospitals, up to 1,000: the same rounds and the same privacy accounting, in a few processes.

    For research on data that are yours: the records are divided over hospitals that share this machine, or a Ray cluster (needs the
    extra 'simulate'). Every hospital masks its summand, so with noise off the model equals that of real parties bit for bit. There
    are no links and no signatures, nobody is lost, and nobody is protected from anybody.

    Writes to --out what `mpc-fl train` writes but for what parties sign or keep to go on. Begin small, and see that it works:

        mpc-fl simulate configs/demo.yaml --hospitals 20 --set training.rounds=2 --set training.batch_size=20 --out runs/20
    """
    from mpc_fl.apps.simulation.ray_workers import ray_workers, require_ray

    require_ray(workers, address)
    counted = [] if hospitals is None else [f"federation.hospitals={hospitals}"]
    settings = configure(config, [*(overrides or []), *counted, "task=simulate"], from_model, data=data)
    from mpc_fl.apps.simulation.simulation import simulate as run

    placing = functools.partial(ray_workers, workers=workers, address=address)
    with shown_progress() as progress:
        summary = run(settings, out, command_line(), progress, placing)
    if as_json:
        print_json({**summary.to_json(), "report": str(out / "report.html")})
        return
    _say_simulation(summary, 1 / len(settings.data.classes))
    say(f"Model:  {out / 'model.safetensors'}, with its card\nReport: {out / 'report.html'}")


def _say_simulation(summary: TrainingSummary, chance: float) -> None:
    """What the model can do, and what patients have spent at most: of hundreds of hospitals no line for each."""
    if summary.synthetic:
        say("Data: SYNTHETIC phantoms, not patients.")
    say(f"SIMULATED: {len(summary.hospitals)} hospitals, {summary.rounds} rounds, no signatures.")
    final = summary.final
    if final is not None:
        say(
            f"Accuracy {final.accuracy:.1%} (95 % interval {final.accuracy_low:.1%} to {final.accuracy_high:.1%}) on "
            f"{final.records} test {'records' if final.noise is None else 'patients'}; chance {chance:.1%}."
        )
    spent = [line.epsilon for line in summary.privacy if line.epsilon is not None]
    if len(spent) < len(summary.privacy):
        say("NO differential privacy (privacy.mechanism: none).")
    elif spent:
        first = summary.privacy[0]
        say(
            f"Epsilon {min(spent):.3f} to {max(spent):.3f} per {summary.counted_unit} at delta {first.delta:g}, by hospital."
        )
    say_skipped(summary.skipped_files)
