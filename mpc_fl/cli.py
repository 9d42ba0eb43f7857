"""The command line: `mpc-fl train | infer | report | party | check | estimate`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mpc_fl.config import Config, load_config
from mpc_fl.errors import MpcFlError

app = typer.Typer(
    name="mpc-fl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals learn together and diagnose together on secret-shared tensors. Start with: make demo",
)
errors = Console(stderr=True, highlight=False)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, for example configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")]
DataPath = Annotated[
    Path | None, typer.Option("--data", help="Data: DIR/{train,test}/<class>/, .npz or .csv. Not needed for phantoms.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]
OutPath = Annotated[Path, typer.Option("--out", help="New directory for the results; must not exist.")]


def _configure(path: Path, overrides: list[str] | None, **site: Path | None) -> Config:
    config = load_config(path, overrides)
    given = {name: str(value.absolute()) for name, value in site.items() if value is not None}
    return config.with_values(site=given) if given else config


def _command() -> str:
    return shlex.join(["mpc-fl", *sys.argv[1:]])


def _print_json(value: Any) -> None:
    from mpc_fl.files import finite

    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


@contextmanager
def _bars() -> Iterator[Callable[[str, str, int, int], None]]:
    """One progress bar per phase; each party's part of it adds up."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=False) as bars:
        tasks: dict[str, TaskID] = {}
        states: dict[str, dict[str, tuple[int, int]]] = {}

        def progress(party: str, phase: str, done: int, total: int) -> None:
            states.setdefault(phase, {})[party] = (done, total)
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            parts = states[phase].values()
            bars.update(tasks[phase], completed=sum(p[0] for p in parts), total=sum(p[1] for p in parts))

        yield progress


@app.command()
def train(
    config: ConfigPath,
    out: OutPath,
    data: DataPath = None,
    overrides: Overrides = None,
    ledger: Annotated[Path | None, typer.Option(help="Directory of privacy ledgers that outlive this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train one model with several hospitals on this machine, each a process of its own.

    Every hospital adds differential-privacy noise, shares its update, and only the mean is opened. Writes
    model.safetensors, metrics.jsonl, openings.jsonl, logs/ and report.html to --out.
    """
    from mpc_fl import run

    settings = _configure(config, overrides, data=data, privacy_ledger=ledger)
    _preflight(settings)
    with _bars() as progress:
        summary = run.train(settings, out, _command(), progress)
    if as_json:
        _print_json({**summary, "report": str(out / "report.html")})
        return
    final, chance = summary["final"], 1 / len(settings.data.classes)
    if summary["synthetic"]:
        _say("Data: SYNTHETIC phantoms, not patients.")
    _say(
        f"Accuracy {final['accuracy']:.1%} (95 % interval {final['accuracy_low']:.1%} to {final['accuracy_high']:.1%}) "
        f"on {final['records']} test records; chance {chance:.1%}."
    )
    for line in summary["privacy"]:
        if line["epsilon"] is not None:
            _say(
                f"{line['hospital']}: epsilon {line['epsilon']:.3f} at delta {line['delta']:g}, "
                f"noise multiplier {line['noise_multiplier']:.3f}."
            )
        else:
            _say(f"{line['hospital']}: NO differential privacy (privacy.mechanism: none).")
    _say(f"Model:  {out / 'model.safetensors'}\nReport: {out / 'report.html'}")


@app.command()
def infer(
    config: ConfigPath,
    out: OutPath,
    model: Annotated[Path, typer.Option(help="model.safetensors of a training run; the model owner's secret.")],
    images: Annotated[
        Path | None, typer.Option(help="Image file or directory; the hospital's secret. Phantoms need none.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Diagnose images under encryption: the model owner never sees them, the hospital never sees the weights.

    Three processes: hospital, model owner, dealer. Only the hospital learns the result. With
    --set inference.plaintext_reference=true the same images are also run in the clear, to compare.
    """
    from mpc_fl import run

    settings = _configure(config, overrides, model=model, images=images)
    with _bars() as progress:
        summary = run.infer(settings, out, _command(), progress)
    if as_json:
        _print_json({**summary, "report": str(out / "report.html")})
        return
    if summary["synthetic"]:
        _say("Data: SYNTHETIC phantoms, not patients.")
    for line in summary["results"]:
        name = summary["classes"][line["predicted"]]
        _say(f"{line['name']}: {name} ({max(line['probabilities']):.1%}), {line['seconds']:.1f} s")
    if summary["comparison"] is not None:
        difference = summary["comparison"]["largest_logit_difference"]
        agree = "agree" if summary["comparison"]["classes_agree"] else "DIFFER"
        _say(f"Encrypted and plaintext classes {agree}; largest logit difference {difference:.5f}.")
    _say(f"Report: {out / 'report.html'}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], as_json: AsJson = False) -> None:
    """Write report.html of a finished run again, from its files."""
    from mpc_fl import run

    path = run.report(run_dir)
    _print_json({"report": str(path)}) if as_json else _say(f"Report: {path}")


@app.command()
def party(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="hospital, aggregator, dealer or model-owner")],
    config: Annotated[Path, typer.Option(help="The run's configuration: same file everywhere but for `site`.")],
    rank: Annotated[int, typer.Option(min=0, help="Rank of a hospital.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory where this party writes.")] = None,
    identity: Annotated[Path | None, typer.Option(help="Directory with this party's key and certificate.")] = None,
    data: DataPath = None,
    images: Annotated[Path | None, typer.Option(help="Hospital: images to diagnose.")] = None,
    model: Annotated[Path | None, typer.Option(help="Model owner: model.safetensors.")] = None,
    overrides: Overrides = None,
) -> None:
    """Run one party alone, as a site does on its own machine. The launcher spawns exactly these programs.

    The configuration must hold federation.addresses (host:port of every party) and a fresh federation.session.
    """
    from mpc_fl.launcher import run_party, set_up_log

    settings = _configure(config, overrides, out=out, identity=identity, data=data, images=images, model=model)
    set_up_log(settings.site.log)
    name = f"hospital-{rank}" if role == "hospital" else role
    with _bars() as progress:
        run_party(name, settings, lambda phase, done, total: progress(name, phase, done, total))


@app.command()
def check(config: ConfigPath, data: DataPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say whether a training run can work: data readable, every hospital served, headroom, privacy budget, memory."""
    settings = _configure(config, overrides, data=data)
    found = _preflight(settings)
    if as_json:
        _print_json({"ok": True, **found})
        return
    for line in found["privacy"]:
        _say(f"{line['hospital']}: {line['patients']} training patients" + _privacy_words(line))
    _say(f"Headroom: {found['headroom_bits_spare']} bits to spare. The run can work.")


@app.command()
def estimate(config: ConfigPath, data: DataPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what training and one encrypted diagnosis cost: bytes, messages, rounds, epsilon."""
    from mpc_fl.data import patients_per_hospital
    from mpc_fl.estimate import estimate_inference, estimate_training

    settings = _configure(config, overrides, data=data)
    training = estimate_training(settings, patients_per_hospital(settings))
    inference = estimate_inference(settings)
    if as_json:
        _print_json({"training": training, "inference": inference})
        return
    _say(f"Training, {training['rounds']} rounds of {training['parameters']:,} parameters:")
    _say(f"  each hospital sends {training['bytes_sent_per_hospital'] / 1e6:,.1f} MB")
    _say(f"  the aggregator sends {training['bytes_sent_by_aggregator'] / 1e6:,.1f} MB")
    for line in training["privacy"]:
        _say(f"  {line['hospital']}: {line['patients']} patients" + _privacy_words(line))
    _say(f"Encrypted inference, a batch of {inference['batch']}:")
    _say(f"  {inference['bytes_per_party'] / 1e6:,.1f} MB sent per party in {inference['rounds']} rounds")
    _say(f"  {inference['comparisons']:,} comparisons, {inference['multiplications']:,} secret multiplications")


def _privacy_words(line: dict[str, Any]) -> str:
    if line["epsilon"] is None:
        return ", no differential privacy"
    return f", epsilon {line['epsilon']:.2f} with noise multiplier {line['noise_multiplier']:.3f}"


def _preflight(config: Config) -> dict[str, Any]:
    """Everything that can be refused before a process starts. Raises the error the run would raise."""
    from mpc_fl.data import patients_per_hospital
    from mpc_fl.estimate import estimate_training
    from mpc_fl.federation import headroom_of
    from mpc_fl.privacy import check_delta

    headroom_of(config).require()
    patients = patients_per_hospital(config)
    if config.privacy.mechanism == "local":
        for rank, count in enumerate(patients):
            check_delta(config.privacy.delta, count, f"hospital-{rank}")
    return estimate_training(config, patients)


def _interrupted(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: one line per error and its exit code, never a traceback for what a user can mend."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        app()
    except MpcFlError as error:
        errors.print(f"mpc-fl: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        errors.print("mpc-fl: interrupted; all parties were stopped", style="red", markup=False)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
