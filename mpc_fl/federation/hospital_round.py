"""One federated round, as every role runs it: the main path of training.

Round k, hospitals 0..n-1 and the aggregator, all of them CrypTen parties of one world:
  1. the aggregator says who takes part; all of them start from the same global model (`attendance`)
  2. each hospital charges its privacy ledger, then trains with differentially private SGD on its own patients
  3. each hospital encodes its weighted update in the ring; refused if it does not fit
  4. closed sum: who is late is left out, the quorum is checked, the sum is opened to the aggregator alone (`quorum_sum`)
  5. the aggregator steps along the mean and sends the new global model
  6. all hospitals evaluate it on their own test patients; only the sum of the counts is opened
  7. all sign the round's openings and the new global model into the reveal ledger

Weights. The total number of training patients N is opened once, over all hospitals. Hospital i's weight is its number
over N', the public power of two above N, so that the sum of weighted updates is a mean and needs no headroom for counts.
A round that somebody misses opens no sum of counts of its own: its difference to N would be the absent hospital's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpc_fl.aggregation.quorum_sum import Description, Missed, Rules, broadcast, collect, contribute, next_word, say
from mpc_fl.config.config import AGGREGATOR, Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ProtocolError, QuorumError, SumLostError
from mpc_fl.federation.attendance import Attendance, RoundPlan
from mpc_fl.federation.feature_statistics import Normalisation, decode_features, encode_features, plan_features
from mpc_fl.federation.federated_sgd import Steps, aggregator_steps, hospital_steps, privacy_of_steps, send_global
from mpc_fl.federation.planning import (
    Aggregator,
    Hospital,
    calibrate_on_public_images,
    checked,
    features_run_name,
    headroom_of,
    run_name,
)
from mpc_fl.learning.models.architectures import flatten_parameters, load_flat_parameters
from mpc_fl.learning.models.evaluation import (
    Evaluation,
    decode_evaluation,
    encode_evaluation,
    evaluate_locally,
    evaluation_length,
)
from mpc_fl.learning.models.model_file import flatten_buffers, load_flat_buffers
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.training.dp_sgd import train_locally
from mpc_fl.learning.training.server_optimizers import calibrate_own
from mpc_fl.links.links import Links
from mpc_fl.sharing.opening import SecretDomain

log = logging.getLogger(__name__)

EVALUATION_CHUNK = 64

Notify = Callable[[str, int, int], None]


@torch.no_grad()
def predict(model: nn.Module, inputs: torch.Tensor, chunk: int = EVALUATION_CHUNK) -> torch.Tensor:
    """Logits of a model in evaluation mode, float32 (records, classes)."""
    model.eval()
    pieces = [model(inputs[start : start + chunk]) for start in range(0, len(inputs), chunk)]
    return torch.cat(pieces) if pieces else torch.zeros(0, 1)


# ---- before the first round --------------------------------------------------------------------------------------------


def send_model(aggregator: Aggregator, links: Links, names: tuple[str, ...]) -> None:
    """Parameters, frozen statistics and normalisation of inputs, for hospitals that begin, join, or begin anew."""

    def send(name: str) -> None:
        links.send_tensor(name, "parameters", flatten_parameters(aggregator.model))
        links.send_tensor(name, "statistics", flatten_buffers(aggregator.model))
        if aggregator.normalisation is not None:
            links.send_tensor(name, "normalisation", aggregator.normalisation.tensor())

    broadcast(names, send)


def receive_model(hospital: Hospital, links: Links, normalised: bool) -> None:
    """A hospital's side of `send_model`, so that all start bit for bit alike."""
    parameters, buffers = flatten_parameters(hospital.model), flatten_buffers(hospital.model)
    load_flat_parameters(
        hospital.model, links.receive_tensor(AGGREGATOR, "parameters", torch.float32, parameters.shape)
    )
    load_flat_buffers(hospital.model, links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape))
    if normalised:
        values = links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, None)
        hospital.normalise(Normalisation.of_tensor(values))


def _all(config: Config, rules: Rules) -> Rules:
    """For sums over all hospitals alone, whoever may be missing later; of whole numbers, so without a check of norms."""
    return replace(rules, smallest=config.federation.hospitals, check=None)


def hospital_preparation(hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...]) -> None:
    """Sums over all hospitals before the first round, at a hospital: features if so configured, and the patients."""
    config, rules = hospital.config, _all(hospital.config, rules)
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan, ledger = plan_features(config), hospital.ledger
        event = plan.event()
        if event is not None:
            run = features_run_name(config)
            ledger.charge(event, run=run, round_number=0, budget=hospital.budget, reserve=True)
        encoded = encode_features(plan, hospital.train, hospital.noise_seed.derive("features"), config.runtime.threads)
        release = None if event is None else ledger.release
        contribute(domain, rules, hospitals, ("features",), encoded, _FEATURES, release)
        values = domain.links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, (2, plan.features))
        hospital.normalise(Normalisation.of_tensor(values))
        buffers = flatten_buffers(hospital.model)
        load_flat_buffers(
            hospital.model, domain.links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape)
        )
    if config.aggregation.weighted:
        count = Private("number of patients", torch.tensor([hospital.train.patient_count], dtype=torch.int64))
        contribute(domain, rules, hospitals, ("patients",), count, _PATIENTS)
    calibrate_own(hospital.model, hospital.train.inputs, config)


_FEATURES = Description("sum of features", "mean and deviation of the inputs")
_PATIENTS = Description("number of patients", "total weight of the mean")


def aggregator_preparation(aggregator: Aggregator, domain: SecretDomain, rules: Rules, attendance: Attendance) -> None:
    """Sums over all hospitals before the first round, at the aggregator."""
    config, rules, hospitals = aggregator.config, _all(aggregator.config, rules), attendance.members
    domain.links.set_phase("preparation")
    if config.data.normalise == "secure":
        plan = plan_features(config)
        shape = (plan.length,)
        _, total = collect(domain, rules, hospitals, attendance.starts, ("features",), torch.int64, shape, _FEATURES)
        aggregator.normalisation = decode_features(plan, total).normalisation
        values = aggregator.normalisation.tensor()
        calibrate_on_public_images(aggregator.model, config, aggregator.normalisation)
        buffers = flatten_buffers(aggregator.model)

        def send(name: str) -> None:
            domain.links.send_tensor(name, "normalisation", values)
            domain.links.send_tensor(name, "statistics", buffers)

        broadcast(hospitals, send)
    aggregator.patients = config.federation.hospitals
    if config.aggregation.weighted:
        _, total = collect(domain, rules, hospitals, attendance.starts, ("patients",), torch.int64, (1,), _PATIENTS)
        aggregator.patients = int(total)
        if not 0 < aggregator.patients <= config.federation.hospitals * config.aggregation.count_bound:
            raise ProtocolError("the opened number of patients cannot be", "a hospital does not follow the protocol")
    aggregator.weight_total = 1 << (aggregator.patients - 1).bit_length()


# ---- a round at a hospital ---------------------------------------------------------------------------------------------


def hospital_round(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> dict[str, Any] | Missed:
    """Steps 2 to 6 at a hospital. Returns this site's own metrics (they never leave it), or why there are none.

    Raises `PrivacyBudgetError` before training if the round would exceed the budget, `HeadroomError` if the update is
    NaN, infinite or too large, before anything is sent; `PeerLostError` when the aggregator is lost or late.
    """
    began, rounds, links, number = time.monotonic(), hospital.config.training.rounds, domain.links, plan.number
    links.set_phase(f"round {number} training")
    if hospital.noise_multiplier is not None:
        charge_round(hospital, number)
    take_steps = _gradient_steps if hospital.mechanism is not None else _local_steps
    size = len(hospital.shared_parameters)
    check = checked(rules, hospital.config, hospital.mechanism, size, plan.weight_total)
    taken = take_steps(hospital, domain, check, plan, notify)
    if isinstance(taken, str):
        return taken
    hospitals, steps, train_seconds = taken
    aggregate_seconds = time.monotonic() - began - train_seconds
    log.info("round %d: trained in %.1f s, aggregated in %.1f s", number, train_seconds, aggregate_seconds)
    notify("aggregation", number, rounds)

    # 6. Evaluate on the hospital's own test patients; only sums over hospitals are opened.
    evaluation_began = time.monotonic()
    own = hospital_evaluation(hospital, domain, rules, hospitals, plan.number, plan.attempt)
    notify("evaluation", number, rounds)
    return {
        "round": number,
        "loss": steps.mean_loss,
        "epsilon": hospital.epsilon(),
        "noise_multiplier": hospital.noise_multiplier,
        "clipped_fraction": steps.clipped_fraction,
        "steps": steps.count,
        "method": steps.method,
        "own_accuracy": own.accuracy,
        "own_records": own.records,
        "skipped_files": hospital.train.skipped + hospital.test.skipped,
        "seconds": {
            "train": train_seconds,
            "aggregate": aggregate_seconds,
            "evaluate": time.monotonic() - evaluation_began,
        },
    }


Taken = tuple[tuple[str, ...], Steps, float]


def _local_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Steps 2 to 5: local training, then one closed sum of the weighted updates."""
    config, links, number = hospital.config, domain.links, plan.number
    began = time.monotonic()
    local = train_locally(
        hospital.model,
        hospital.train,
        config,
        hospital.noise_multiplier,
        hospital.sample_rate,
        hospital.noise_seed.derive("round", number, plan.attempt),
        hospital.sampling_seed,
        number,
        _progress(config, number, notify),
        hospital.method,
        hospital.group,
    )
    trained = time.monotonic() - began

    # 3. Encode; the weight is as secret as the update.
    links.set_phase(f"round {number} aggregation")
    count = hospital.train.patient_count if config.aggregation.weighted else 1
    label, update = f"update of {hospital.name}", local.update[hospital.coordinates]
    encoded = Private(label, headroom_of(config).encode(update, count / plan.weight_total, label))

    # 4. and 5. Closed sum, opened to the aggregator, which sends the new global model.
    about = _mean_update(config, number)
    release = hospital.ledger.release if hospital.noise_multiplier is not None else None
    admitted = contribute(domain, rules, plan.hospitals, ("update", number, plan.attempt), encoded, about, release)
    del encoded
    if hospital.name not in admitted:
        return "left out"
    if next_word(links, AGGREGATOR, ("model", "void"))["word"] == "void":
        return "void"
    trained_model = flatten_parameters(hospital.model) + local.update
    load_flat_parameters(hospital.model, trained_model)
    shape = hospital.shared_parameters.shape
    hospital.take_global(links.receive_tensor(AGGREGATOR, "global model", torch.float32, shape))
    return admitted, Steps(local.mean_loss, local.clipped_fraction, local.steps, local.method), trained


def _gradient_steps(
    hospital: Hospital, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> Taken | Missed:
    """Distributed noise: steps 2 to 5 for every single step, see `federated_sgd`."""
    assert hospital.mechanism is not None
    links, phase = domain.links, f"round {plan.number} training"
    before = links.seconds_of(phase)
    taken = hospital_steps(
        domain,
        rules,
        hospital.model,
        hospital.train,
        hospital.config,
        hospital.mechanism,
        hospital.sample_rate,
        hospital.noise_seed.derive("round", plan.number, plan.attempt),
        hospital.sampling_seed,
        (plan.number, plan.attempt),
        plan.hospitals,
        hospital.method,
        _progress(hospital.config, plan.number, notify),
        hospital.ledger.release,
    )
    return taken if isinstance(taken, str) else (*taken, links.seconds_of(phase) - before)


def _progress(config: Config, number: int, notify: Notify) -> Callable[[int, int], None]:
    def step_done(done: int, total: int) -> None:
        notify("training", (number - 1) * total + done, config.training.rounds * total)

    return step_done


def _mean_update(config: Config, number: int) -> Description:
    privacy = privacy_of_steps(config, config.training.local_steps)
    return Description("sum of weighted updates", f"round {number}: mean update", privacy)


def charge_round(hospital: Hospital, number: int) -> None:
    """Write the round's release into the privacy ledger before anything that depends on patients is computed."""
    assert hospital.noise_multiplier is not None
    steps = hospital.config.training.local_steps
    if hospital.mechanism is not None:
        event = hospital.mechanism.event(hospital.sample_rate, steps)
    else:
        event = SubsampledGaussian(hospital.noise_multiplier, hospital.sample_rate, steps)
    run = run_name(hospital.config)
    hospital.ledger.charge(event, run=run, round_number=number, budget=hospital.budget, reserve=True)


def hospital_evaluation(
    hospital: Hospital, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], number: int, attempt: int
) -> Evaluation:
    """Step 6 at a hospital; also run once before the first round."""
    domain.links.set_phase(f"round {number} evaluation")
    probabilities = torch.softmax(predict(hospital.model, hospital.test.inputs), dim=1)
    own = evaluate_locally(probabilities, hospital.test.labels)
    encoded = encode_evaluation(own, hospital.config.aggregation.count_bound)
    if next_word(domain.links, AGGREGATOR, ("evaluate", "skip"))["word"] == "evaluate":
        counts = Private(f"evaluation of {hospital.name}", encoded)
        rules, label = _evaluating(hospital.config, rules), ("evaluation", number, attempt)
        contribute(domain, rules, hospitals, label, counts, _evaluation_counts(number))
    return own


def _evaluation_counts(number: int) -> Description:
    return Description("sum of evaluation counts", f"round {number}: evaluation counts")


def _evaluating(config: Config, rules: Rules) -> Rules:
    """Counts carry no noise: unless configured otherwise they are opened over all hospitals or not at all."""
    return rules if config.federation.evaluate_incomplete else _all(config, rules)


# ---- a round at the aggregator -----------------------------------------------------------------------------------------


def aggregator_round(
    aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan, notify: Notify
) -> tuple[tuple[str, ...], Evaluation | None]:
    """Steps 4 to 6 at the aggregator: which hospitals made the round, and the evaluation where it may be opened.

    Raises `QuorumError` when too few are left, `SumLostError` when the round has no result and is to be made anew.
    """
    config, links, number = aggregator.config, domain.links, plan.number
    links.set_phase(f"round {number} aggregation")
    size = len(aggregator.shared_parameters)
    check = checked(rules, config, aggregator.mechanism, size, plan.weight_total)
    try:
        if aggregator.mechanism is not None:
            round_of = (number, plan.attempt)
            hospitals = aggregator_steps(
                domain,
                check,
                aggregator.model,
                config,
                aggregator.mechanism,
                aggregator.optimizer,
                round_of,
                plan.hospitals,
                plan.starts,
            )
        else:
            hospitals = _average(aggregator, domain, check, plan)
    except SumLostError:
        say(links, plan.hospitals, "void")
        raise
    notify("aggregation", number, config.training.rounds)

    # 6. Sum of the hospitals' evaluation counts.
    evaluation = aggregator_evaluation(config, domain, rules, hospitals, plan)
    notify("evaluation", number, config.training.rounds)
    if evaluation is not None:
        log.info("round %d: accuracy %.1f %% on the test records of all hospitals", number, 100 * evaluation.accuracy)
    return hospitals, evaluation


def _average(aggregator: Aggregator, domain: SecretDomain, rules: Rules, plan: RoundPlan) -> tuple[str, ...]:
    """Steps 4 and 5 at the aggregator: open the weighted mean of the updates, step along it, send the new model."""
    config, links, headroom = aggregator.config, domain.links, headroom_of(aggregator.config)
    label, shape = ("update", plan.number, plan.attempt), aggregator.shared_parameters.shape
    about = _mean_update(config, plan.number)
    hospitals, total = collect(domain, rules, plan.hospitals, plan.starts, label, headroom.dtype, shape, about)
    shared = aggregator.step(headroom.decode(total, -aggregator.mean_factor(len(hospitals))))
    send_global(links, hospitals, shared)
    return hospitals


def aggregator_evaluation(
    config: Config, domain: SecretDomain, rules: Rules, hospitals: tuple[str, ...], plan: RoundPlan
) -> Evaluation | None:
    """Step 6 at the aggregator; also run once before the first round. `None` when somebody is missing."""
    domain.links.set_phase(f"round {plan.number} evaluation")
    rules, label = _evaluating(config, rules), ("evaluation", plan.number, plan.attempt)
    if len(hospitals) < rules.smallest:
        say(domain.links, hospitals, "skip")
        return None
    say(domain.links, hospitals, "evaluate")
    classes = len(config.data.classes)
    shape, about = (evaluation_length(classes),), _evaluation_counts(plan.number)
    try:
        _, total = collect(domain, rules, hospitals, plan.starts, label, torch.int64, shape, about)
    except QuorumError as error:
        # Nothing was opened and nobody need wait: the round itself has its result.
        log.warning("%s", error)
        say(domain.links, hospitals, "fixed", hospitals=[])
        return None
    except SumLostError as error:
        log.warning("%s", error)
        return None
    return decode_evaluation(total, classes)


# ---- the end -----------------------------------------------------------------------------------------------------------


def announce_end(links: Links, hospitals: tuple[str, ...], rounds: int) -> None:
    """At the aggregator, when its results are written: tell all hospitals that the run is complete."""
    links.set_phase("conclusion")
    for name in hospitals:
        links.send_object(name, "complete", {"rounds": rounds})


def await_end(links: Links, rounds: int) -> None:
    """At a hospital: nothing counts as a success before the aggregator says so. Raises `PeerLostError` otherwise."""
    links.set_phase("conclusion")
    if links.receive_object(AGGREGATOR, "complete").get("rounds") != rounds:
        raise ProtocolError("the aggregator ended after another number of rounds", "run the same version everywhere")
