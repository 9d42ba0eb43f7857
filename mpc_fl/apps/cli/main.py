"""The command line: `mpc-fl train | infer | serve | report | party | check | estimate | pki | bench`."""

from __future__ import annotations

import json
import os
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

from mpc_fl.apps.cli import bench, pki
from mpc_fl.apps.cli import dealer as dealer_commands
from mpc_fl.apps.cli import ledger as ledger_commands
from mpc_fl.config.config import Config, load_config
from mpc_fl.errors import ConfigError, MpcFlError, RefusedError

app = typer.Typer(
    name="mpc-fl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals learn together and diagnose together on secret-shared tensors. Start with: make demo",
)
app.add_typer(pki.app, name="pki")
app.add_typer(bench.app, name="bench")
app.add_typer(ledger_commands.app, name="ledger")
app.add_typer(dealer_commands.app, name="dealer")
errors = Console(stderr=True, highlight=False)
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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
    """One progress bar per phase; each party's part of it adds up. Nothing is drawn before the first step."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=errors, transient=False)
    tasks: dict[str, TaskID] = {}
    states: dict[str, dict[str, tuple[int, int]]] = {}

    def progress(party: str, phase: str, done: int, total: int) -> None:
        bars.start()
        states.setdefault(phase, {})[party] = (done, total)
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase)
        parts = states[phase].values()
        bars.update(tasks[phase], completed=sum(p[0] for p in parts), total=sum(p[1] for p in parts))

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


@app.command()
def train(
    config: ConfigPath,
    out: OutPath,
    data: DataPath = None,
    overrides: Overrides = None,
    ledger: Annotated[Path | None, typer.Option(help="Directory of privacy ledgers that outlive this run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that failed or was killed at --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model with several hospitals on this machine, each a process of its own.

    Every hospital adds differential-privacy noise, shares its update, and only the mean is opened. Writes
    model.safetensors, metrics.jsonl, openings.jsonl, logs/ and report.html to --out.
    """
    from mpc_fl.apps.runs import local_runs as run

    settings = _configure(config, overrides, data=data, privacy_ledger=ledger)
    _preflight(settings)
    with _bars() as progress:
        summary = run.train(settings, out, _command(), progress, resume)
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
    for name in summary["hospitals"]:
        missed = [number for number, hospitals in summary["took_part"].items() if name not in hospitals]
        if missed:
            _say(f"{name} took no part in round {', '.join(missed)}.")
    if ledger is None and settings.privacy.mechanism != "none" and not summary["synthetic"]:
        _say("The privacy ledgers are in this run only; with --ledger DIR they outlive it and bound all runs together.")
    _say_skipped(summary)
    _say(f"Model:  {out / 'model.safetensors'}\nReport: {out / 'report.html'}")


@app.command()
def infer(
    config: ConfigPath,
    out: OutPath,
    model: Annotated[
        Path | None, typer.Option(help="model.safetensors of a training run; the model owner's secret.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image file or directory; the hospital's secret. Phantoms need none.")
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="This hospital's key and certificate, to ask a server.")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Model owner to ask (mpc-fl serve).")] = None,
    dealer: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The server's dealer.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Diagnose images under encryption: the model owner never sees them, the hospital never sees the weights.

    Three processes: hospital, model owner, dealer. Only the hospital learns the result. With
    --set inference.plaintext_reference=true the same images are also run in the clear, to compare.

    With --identity this process is a hospital alone and asks a model owner that stays up (mpc-fl serve); addresses that
    --server and --dealer do not give are those in the configuration's federation.addresses. With --set site.pool=DIR
    batches made ahead (mpc-fl dealer fill --server) are used first.
    """
    from mpc_fl.apps.runs import local_runs as run
    from mpc_fl.inference.serving.client import asking

    if identity is not None or server is not None or dealer is not None:
        settings = _configure(config, overrides, images=images, identity=identity)
        _ask(asking(settings, server, dealer), out, model, as_json)
        return
    if model is None:
        raise ConfigError("no model was given", "pass --model FILE, or --identity DIR to ask a server")
    settings = _configure(config, overrides, model=model, images=images)
    with _bars() as progress:
        summary = run.infer(settings, out, _command(), progress)
    if as_json:
        _print_json({**summary, "report": str(out / "report.html")})
        return
    if summary["synthetic"]:
        _say("Data: SYNTHETIC phantoms, not patients.")
    _say_diagnoses(summary)
    if summary["comparison"] is not None:
        difference = summary["comparison"]["largest_logit_difference"]
        agree = "agree" if summary["comparison"]["classes_agree"] else "DIFFER"
        logits = "logits not opened" if difference is None else f"largest logit difference {difference:.5f}"
        _say(f"Encrypted and plaintext classes {agree}; {logits}.")
    _say_skipped(summary)
    _say(f"Report: {out / 'report.html'}")


def _ask(settings: Config, out: Path, model: Path | None, as_json: bool) -> None:
    """A hospital that asks a server."""
    from mpc_fl.apps.runs import local_runs as run

    if model is not None:
        raise ConfigError("the model is the server's", "leave --model out to ask a server")
    with _bars() as progress:
        summary = run.ask(settings, out, _command(), progress)
    if as_json:
        _print_json({**summary, "report": str(out / "report.html")})
    else:
        if summary["synthetic"]:
            _say("Data: SYNTHETIC phantoms, not patients.")
        _say_diagnoses(summary)
        _say(f"Report: {out / 'report.html'}")
    if summary["refused"]:
        raise RefusedError(summary["refused"])


@app.command()
def serve(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="Directory of the service; kept from start to start, holds the quotas.")],
    model: Annotated[Path | None, typer.Option(help="model.safetensors; the model owner's secret.")] = None,
    identity: Annotated[
        Path | None,
        typer.Option(help="Key and certificate of the model owner; without, of a simulation on this machine."),
    ] = None,
    role: Annotated[str, typer.Option(help="With --identity: model-owner, or dealer for the dealer it works with.")] = (
        "model-owner"
    ),
    overrides: Overrides = None,
) -> None:
    """Keep a model owner up that answers any hospital of the federation, until Ctrl-C.

    Hospitals take turns batch by batch; serving.images_per_day and serving.images_per_minute bound what each may ask. With
    --set site.pool=DIR each hospital may keep batches made ahead here (mpc-fl dealer fill --server). Without
    --identity model owner and dealer run here, with identities for all hospitals in OUT/parties/NAME/identity.
    """
    from mpc_fl.apps.runs import local_runs as run
    from mpc_fl.apps.runs.launcher import run_alone, set_up_log

    settings = _configure(config, overrides, model=model, identity=identity, out=out)

    def tell(federation: Path) -> None:
        _say(f"Ask with: mpc-fl infer {federation} --identity {out / 'parties' / 'hospital-0' / 'identity'} --out DIR")
        sys.stdout.flush()

    if role not in ("model-owner", "dealer"):
        raise ConfigError(f"'{role}' cannot serve", "give --role model-owner or --role dealer")
    if identity is None:
        run.serve(settings, out, lambda *_progress: None, tell)
        return
    set_up_log(settings.site.log)
    run_alone(role, settings.with_values(task="serve"), lambda *_progress: None)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], as_json: AsJson = False) -> None:
    """Write report.html of a finished run again, from its files."""
    from mpc_fl.apps.runs import local_runs as run

    path = run.report(run_dir)
    _print_json({"report": str(path)}) if as_json else _say(f"Report: {path}")


@app.command()
def party(
    config: Annotated[Path, typer.Option(help="The run's configuration: same file everywhere but for `site`.")],
    role: Annotated[
        str | None,
        typer.Argument(
            metavar="[ROLE]",
            help="hospital, aggregator, dealer or model-owner; torchrun, Slurm and Kubernetes tell it.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of a hospital, or without ROLE of any party.")] = None,
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
    from mpc_fl.apps.runs.launcher import run_alone, set_up_log
    from mpc_fl.apps.runs.placement import party_of, site_of

    settings = _configure(config, overrides, out=out, identity=identity, data=data, images=images, model=model)
    name = party_of(settings, role, rank, os.environ)
    settings = site_of(settings, name)
    set_up_log(settings.site.log)
    with _bars() as progress:
        run_alone(name, settings, lambda phase, done, total: progress(name, phase, done, total))


@app.command()
def check(config: ConfigPath, data: DataPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say whether a training run can work: data readable, every hospital served, headroom, privacy budget, memory."""
    try:
        settings = _configure(config, overrides, data=data)
        found = _preflight(settings)
        _require_memory(settings, found)
    except MpcFlError as error:
        if as_json:
            _print_json({"ok": False, "error": error.what, "fix": error.fix})
        raise
    if as_json:
        _print_json({"ok": True, **found})
        return
    for line in found["privacy"]:
        _say(f"{line['hospital']}: {line['patients']} training patients" + _privacy_words(line))
    _say(f"Headroom: {found['headroom_bits_spare']} bits to spare.")
    _say(f"Memory: {_gigabytes(found, 'hospital')} per hospital. The run can work.")


@app.command()
def estimate(config: ConfigPath, data: DataPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what training and one encrypted diagnosis cost: bytes, messages, rounds, epsilon, memory."""
    from mpc_fl.apps.runs.estimate import estimate_inference, estimate_training
    from mpc_fl.learning.data.loading import patients_per_hospital

    settings = _configure(config, overrides, data=data)
    training = estimate_training(settings, patients_per_hospital(settings))
    inference = estimate_inference(settings)
    if as_json:
        _print_json({"training": training, "inference": inference})
        return
    _say(f"Training, {training['rounds']} rounds of {training['parameters']:,} parameters:")
    sent, messages = training["bytes_sent_per_hospital"] / 1e6, training["messages_per_hospital"]
    _say(
        f"  each hospital sends {sent:,.1f} MB in {messages} messages, needs {_gigabytes(training, 'hospital')} of memory"
    )
    _say(f"  the aggregator sends {training['bytes_sent_by_aggregator'] / 1e6:,.1f} MB")
    for line in training["privacy"]:
        _say(f"  {line['hospital']}: {line['patients']} patients" + _privacy_words(line))
    _say(f"Encrypted inference, a batch of {inference['batch']}:")
    steps = "sequential messages" if settings.inference.engine == "fast" else "rounds"
    _say(f"  {inference['bytes_per_party'] / 1e6:,.1f} MB sent per party in {inference['rounds']} {steps}")
    _say(
        f"  {inference['bytes_sent_by_dealer'] / 1e6:,.1f} MB sent by the dealer; {_gigabytes(inference, 'party')} of memory"
    )
    _say(f"  {inference['comparisons']:,} comparisons, {inference['multiplications']:,} secret multiplications")


def _gigabytes(estimate: dict[str, Any], who: str) -> str:
    return f"about {estimate[f'memory_bytes_per_{who}'] / 1e9:.1f} GB"


def _say_diagnoses(summary: dict[str, Any]) -> None:
    for line in summary["results"]:
        name = summary["classes"][line["predicted"]]
        chance = f" ({max(line['probabilities']):.1%})" if line["probabilities"] else ""  # the label alone was opened
        _say(f"{line['name']}: {name}{chance}, {line['seconds']:.1f} s")


def _say_skipped(summary: dict[str, Any]) -> None:
    if summary["skipped_files"]:
        _say(f"Unreadable files left out: {summary['skipped_files']}; the logs of the hospitals name them.")


def _privacy_words(line: dict[str, Any]) -> str:
    if line["epsilon"] is None:
        return ", no differential privacy"
    return f", epsilon {line['epsilon']:.2f} with noise multiplier {line['noise_multiplier']:.3f}"


def _preflight(config: Config) -> dict[str, Any]:
    """Everything that can be refused before a process starts. Raises the error the run would raise."""
    from mpc_fl.apps.runs.estimate import estimate_training
    from mpc_fl.federation.planning import headroom_of
    from mpc_fl.learning.data.loading import patients_per_hospital

    headroom_of(config).require()
    return estimate_training(config, patients_per_hospital(config))


def _require_memory(config: Config, found: dict[str, Any]) -> None:
    """Of this machine: for all parties when the launcher runs them here, for one hospital when the others have addresses."""
    from mpc_fl.apps.runs.estimate import available_memory

    parties = 1 if config.federation.addresses else config.federation.hospitals + 1
    needed, available = parties * found["memory_bytes_per_hospital"], available_memory()
    if available is not None and needed > available:
        raise MpcFlError(
            f"{parties} {'parties need' if parties > 1 else 'party needs'} about {needed / 1e9:.1f} GB of memory together, "
            f"{available / 1e9:.1f} GB are available",
            "use fewer hospitals, data.subset, a smaller training.batch_size, or training.per_sample_gradients=loop",
        )


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP. Not a KeyboardInterrupt, which typer would end without a word."""


def _interrupted(number: int, _frame: object) -> NoReturn:
    for interrupt in _INTERRUPTS:
        signal.signal(interrupt, signal.SIG_IGN)  # a second one must not stop the cleaning up, which takes seconds
    raise Interrupted(number)


def main() -> None:
    """Entry point: one line per error and its exit code, never a traceback for what a user can mend."""
    # An ignored signal stays ignored: SIGHUP under nohup, SIGINT of a job in the background.
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number in (number for number in _INTERRUPTS if before[number] != signal.SIG_IGN):
        signal.signal(number, _interrupted)
    try:
        app()
    except MpcFlError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        where = f" of {error.filename}" if error.filename else ""
        _end(f"input or output{where} failed: {error.strerror}: check permissions and free space", 1)
    except Interrupted as error:
        _end(f"interrupted by {signal.Signals(error.args[0]).name}: nothing was left running", 128 + error.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(message: str, code: int) -> NoReturn:
    errors.print(f"mpc-fl: {message}", style="red", markup=False, soft_wrap=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
