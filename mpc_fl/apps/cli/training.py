"""`mpc-fl train | check | estimate`: hospitals that train together on this machine, and what that takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.interrupts import Interrupted
from mpc_fl.apps.cli.options import (
    Anyway,
    AsJson,
    ConfigPath,
    DataPath,
    FromModel,
    OutPath,
    Overrides,
    begin_on_ledgers,
    command_line,
    configure,
    earlier_failure_of,
    print_json,
    privacy_words,
    say,
    say_earlier_failure,
    say_skipped,
)
from mpc_fl.apps.cli.preflight import (
    about_features,
    forecasts_of,
    packages_of,
    preflight,
    refuse_shared_patients,
    require_memory,
    say_features,
    say_shared_patients,
    shared_patients_of,
)
from mpc_fl.apps.cli.progress import shown_progress
from mpc_fl.apps.formats import duration, in_ranges, size
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.errors import ConfigError, MpcFlError, RunFailedError
from mpc_fl.roles import is_hospital

if TYPE_CHECKING:
    from mpc_fl.apps.summaries import TrainingSummary
    from mpc_fl.config.config import Config

_GO_ON = "--resume goes on from the last round"


def train(
    config: ConfigPath,
    out: OutPath,
    data: DataPath = None,
    overrides: Overrides = None,
    ledger: Annotated[Path | None, typer.Option(help="Directory of privacy ledgers that outlive this run.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run at --out: it failed, or is to have more training.rounds."),
    ] = False,
    from_model: FromModel = None,
    central: Annotated[
        bool,
        typer.Option(
            "--central", help="Train on all patients in one place instead, to compare with: no privacy, no parties."
        ),
    ] = False,
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Train one model with several hospitals on this machine, each a process of its own.

    Every hospital adds differential-privacy noise, shares its update, and only the mean is opened. Writes
    model.safetensors with its model_card.md, metrics.jsonl, openings.jsonl, logs/ and report.html to --out.

    With --central the same recipe runs on the same patients in one place; mpc-fl compare sets its accuracy
    and costs beside those of the federation.
    """
    from mpc_fl.apps.runs.launcher import start_early

    if resume and from_model is not None:
        raise ConfigError(f"{out} goes on from its own model", "leave out --from, or --resume for a new run")
    settings = configure(config, overrides, from_model, data=data, privacy_ledger=ledger)
    if central:
        _train_centrally(settings, out, resume, as_json)
        return
    with start_early(settings, "train") as starter:
        from mpc_fl.apps.runs import local_runs as run
        from mpc_fl.apps.runs.run_directory import may_go_on, require_free

        require_free(out, resume)
        found = preflight(settings, resume)
        forecasts = [] if found is None else forecasts_of(settings, found)
        ledgers = begin_on_ledgers(forecasts, settings.federation.chosen_names, anyway, as_json)
        say_shared_patients(settings, as_json)
        try:
            with shown_progress(settings.federation.chosen_names) as progress:
                summary = run.train(settings, out, command_line(), progress, resume, starter)
        except RunFailedError as error:
            # A party that failed by itself says what to do; here one was ended from outside.
            if error.fix and may_go_on(out):
                raise RunFailedError(error.what, f"{error.fix}; {_GO_ON}") from None
            raise
        except Interrupted as error:
            error.then = _GO_ON if may_go_on(out) else ""
            raise
    if as_json:
        beside = {"report": str(out / "report.html"), **earlier_failure_of(out)}
        print_json({**summary.to_json(), "ledgers": ledgers, **beside})
        return
    _say_training(summary)
    if summary.began_with is not None:
        say(_of_the_beginning(settings))
    if _ledgers_end_with_it(settings) and not summary.synthetic:
        say("The privacy ledgers are in this run only; with --ledger DIR they outlive it and bound all runs together.")
    say_skipped(summary.skipped_files)
    say_earlier_failure(out)
    say(f"Model:  {out / 'model.safetensors'}, with its card\nReport: {out / 'report.html'}")


def _train_centrally(settings: Config, out: Path, resume: bool, as_json: bool) -> None:
    """What the federation is compared with. Raises `ConfigError` for what it does not have."""
    from mpc_fl.apps.runs.central_run import train_central

    if resume:
        raise ConfigError("central training keeps nothing to go on from", "leave out --resume, and begin anew")
    say_shared_patients(settings, as_json)
    with shown_progress(settings.federation.chosen_names) as progress:
        summary = train_central(settings, out, command_line(), progress)
    if as_json:
        print_json({**summary.to_json(), "report": str(out / "report.html")})
        return
    say("CENTRAL: the patients of all hospitals in one place, nobody was protected from anybody.")
    _say_training(summary)
    say_skipped(summary.skipped_files)
    say(f"Model:  {out / 'model.safetensors'}\nReport: {out / 'report.html'}")


def _ledgers_end_with_it(config: Config) -> bool:
    """Whether what a run spends is written down in its own directory alone, wherever that was said."""
    return config.privacy.mechanism != "none" and config.site.privacy_ledger is None


def _of_the_beginning(config: Config) -> str:
    """What of the model was there before the run, and what its promise does not cover."""
    from mpc_fl.learning.models.earlier_model import begun_anew

    anew = begun_anew(config)
    layer = f", but for {', '.join(anew)}, which began anew" if anew else ""
    return (
        f"It began with the weights of SHA-256 {config.model.initial_weights}{layer}. What their own training showed of its "
        "patients is in epsilon here only where the same privacy ledger held it (--ledger)."
    )


def _say_training(summary: TrainingSummary) -> None:
    """What the model can do, what the patients have spent, and who was absent."""
    final, rounds_missed, names = summary.final, summary.absences(), ChosenNames.readable(summary.names)
    if summary.synthetic:
        say("Data: SYNTHETIC phantoms, not patients.")
    if final is not None:
        counted = "test records"
        if final.noise is not None:
            counted = f"test {summary.counted_unit}s, counted with noise of {final.noise:.1f}"
        early = summary.evaluated_round is not None and summary.evaluated_round < summary.rounds
        after = f" after round {summary.evaluated_round}" if early else ""
        say(
            f"Accuracy{after} {final.accuracy:.1%} (95 % interval {final.accuracy_low:.1%} to {final.accuracy_high:.1%}) "
            f"on {final.records} {counted}; baseline, always naming the largest class: {final.baseline:.1%}."
        )
        if after:
            say(
                "No evaluation was opened after the last round: exact counts are opened over all hospitals, and some were absent."
            )
    elif summary.validation is None:
        say("No evaluation was opened: hospitals were absent.")
    _say_choice(summary)
    for line in () if summary.groups is None else summary.groups.described():
        say(names.in_text(line))
    for spent in summary.privacy:
        if spent.epsilon is not None:
            say(
                f"{names.shown(spent.hospital)}: epsilon {spent.epsilon:.3f} per {summary.counted_unit} at delta {spent.delta:g}, "
                f"noise multiplier {spent.noise_multiplier:.3f}."
            )
        else:
            why = (
                "privacy.mechanism: none"
                if spent.mechanism == "none"
                else "a run without privacy released these patients' data"
            )
            say(f"{names.shown(spent.hospital)}: NO differential privacy ({why}).")
    for name in summary.hospitals:
        missed = [number for number, absent in rounds_missed.items() if name in absent]
        if missed:
            say(f"{names.shown(name)} took no part in round {in_ranges(missed)}; its log says why.")


def _say_choice(summary: TrainingSummary) -> None:
    """What validation patients said, and what was chosen and fitted by them."""
    found, chosen, fitted = summary.validation, summary.chosen, summary.calibration
    if found is not None:
        noise = "" if found.noise is None else f", counted with noise of {found.noise:.1f}"
        say(
            f"Validation: accuracy {found.accuracy:.1%}, balanced accuracy {found.balanced_accuracy:.1%}, on {found.records} "
            f"validation {'records' if found.noise is None else 'patients'}{noise}."
        )
    if chosen is not None:
        say(f"The model is that of round {chosen.round}, the best of {len(chosen.figures)} validated rounds.")
    if fitted is not None:
        offsets = ", ".join(f"{offset:+g}" for offset in fitted.offsets)
        say(f"Calibration: temperature {fitted.temperature:g}, class offsets {offsets}.")


def check(
    config: ConfigPath,
    data: DataPath = None,
    overrides: Overrides = None,
    ledger: Annotated[Path | None, typer.Option(help="Directory of the privacy ledgers that the run will use.")] = None,
    party: Annotated[
        str | None, typer.Option(metavar="HOSPITAL", help="Check as this hospital, whose own all of --data is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a training run can work: data readable, every hospital served, headroom, privacy budget, memory.

    Every file is read that training will read, so this can take a while. Without --party the data are divided over all hospitals.
    """
    from mpc_fl.apps.data_lines import data_lines, owners_word
    from mpc_fl.apps.estimates import relaying
    from mpc_fl.apps.runs.party_process import require_site_allows
    from mpc_fl.inference.fast.kernels.compiled import kernels
    from mpc_fl.learning.data.survey import survey
    from mpc_fl.learning.device import device_of

    data_found = None
    try:
        settings = configure(config, overrides, data=data, privacy_ledger=ledger)
        if party is not None:
            from mpc_fl.apps.runs.placement import party_of, site_of
            from mpc_fl.apps.runs.site_data import with_own_data

            party = party_of(settings, party, None, {})
            if not is_hospital(party):
                raise ConfigError(f"{party} has no data that could be checked", "give --party the name of a hospital")
            settings.data.require_agreed_columns()
            settings = with_own_data(site_of(settings, party), party)
        require_site_allows(settings, party, by_itself=party is not None)  # before every file is read
        refuse_shared_patients(settings)  # with their names, before the survey refuses without
        data_found = survey(settings)
        for words in () if as_json else data_lines(data_found, settings):
            say(words)  # before what these numbers may have refused
        found = preflight(settings, patients=data_found.training_patients, at=party)
        assert found is not None  # of a run from its start
        require_memory(settings, found)
        forecasts = forecasts_of(settings, found, party)
    except MpcFlError as error:
        if as_json:
            counted = {} if data_found is None else {"data": data_found.to_json()}
            print_json({"ok": False, "error": error.what, "fix": error.fix, **counted})
        raise
    if as_json:
        of = {"device": device_of(settings).words, **found.to_json(), "packages": packages_of(settings)}
        shared, features = list(shared_patients_of(settings).names), about_features(settings)
        of["kernels"] = str(kernels())
        of["data"], of["ledgers"] = data_found.to_json(), [forecast.to_json() for forecast in forecasts]
        print_json({"ok": True, **of, "shared_patients": shared, "features": features})
        return
    say_shared_patients(settings, False)
    for what, package in packages_of(settings).items():
        say(f"{what}: code of the package {package}.")
    owners, names = owners_word(data_found, settings), settings.federation.chosen_names
    on_ledgers = {forecast.hospital for forecast in forecasts}  # these runs get another noise than the first
    for line in found.privacy:
        words = "" if line.hospital in on_ledgers else privacy_words(line.epsilon, line.noise_multiplier)
        say(f"{names.shown(line.hospital)}: {line.patients} training {owners}{words}")
    for forecast in forecasts:
        say(names.in_text(f"{forecast.described}.") + (" A run asks for --anyway." if forecast.is_nearly_spent else ""))
    say(f"Device of hospitals here: {device_of(settings).words}.")
    say(f"Kernels of encrypted diagnosis here: {kernels()}.")
    say_features(settings)
    say(f"Headroom: {found.headroom_bits_spare} bits to spare.")
    if found.mask_neighbours + 1 < settings.federation.hospitals:
        say(
            f"Masks: with {found.mask_neighbours} others each, against the aggregator and {found.masks_against} hospitals."
        )
    if (relayed := relaying(settings, found, size)) is not None:
        say(f"R{relayed[1:]}.")
    say(f"Memory: about {size(found.memory_bytes_per_hospital)} per hospital. The run can work.")


def estimate(config: ConfigPath, data: DataPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what training and one encrypted diagnosis cost: bytes, messages, rounds, epsilon, memory."""
    from mpc_fl.apps.estimates import relaying
    from mpc_fl.apps.runs.estimate import estimate_inference, estimate_training
    from mpc_fl.learning.data.loading import patients_per_hospital

    settings = configure(config, overrides, data=data)
    training = estimate_training(settings, patients_per_hospital(settings))
    inference = estimate_inference(settings)
    if as_json:
        about = {**training.to_json(), "features": about_features(settings)}
        print_json({"training": about, "inference": inference.to_json()})
        return
    say(f"Training, {training.rounds} rounds of {training.parameters:,} parameters:")
    sent, memory = size(training.bytes_sent_per_hospital), size(training.memory_bytes_per_hospital)
    say(f"  each hospital sends {sent} in {training.messages_per_hospital} messages, needs about {memory} of memory")
    opener, whom = "the aggregator", "the aggregator with any"
    if settings.among_peers:
        opener, whom = "each hospital", "any"
    else:
        say(f"  the aggregator sends {size(training.bytes_sent_by_aggregator)}")
    if (relayed := relaying(settings, training, size)) is not None:
        say(f"  {relayed}")
    say(
        f"  masks: each hospital shares them with {training.mask_neighbours} others, holds {training.mask_keys} keys of a sum"
    )
    before = "" if training.mask_neighbours + 1 == settings.federation.hospitals else " that pool before it"
    say(f"  a summand is hidden from {whom} {training.masks_against} hospitals of the sum{before}")
    masking, opening = duration(training.masking_seconds), duration(training.opening_seconds)
    say(f"  masking takes a core {masking} a sum, opening at the quorum {opening} at {opener}")
    took, deadline = duration(training.connecting_seconds), duration(training.connecting_deadline)
    where = "each on a machine of its own" if settings.federation.addresses else "all on this machine"
    say(f"  connecting takes about {took} with {where}; the run waits {deadline} at most for all to be there")
    for line in training.privacy:
        words = privacy_words(line.epsilon, line.noise_multiplier)
        say(
            f"  {settings.federation.chosen_names.shown(line.hospital)}: {line.patients} {settings.data.counted_unit}s{words}"
        )
    say_features(settings)
    say(f"Encrypted inference, a batch of {inference.batch}:")
    steps = "sequential messages" if settings.inference.engine == "fast" else "rounds"
    say(f"  {size(inference.bytes_per_party)} sent per party in {inference.rounds} {steps}")
    say(
        f"  {size(inference.bytes_sent_by_dealer)} sent by the dealer; about {size(inference.memory_bytes_per_party)} of memory"
    )
    say(f"  {inference.comparisons:,} comparisons, {inference.multiplications:,} secret multiplications")
