"""Federated SGD with distributed noise, real processes: only the exact noised sum comes out, at 4 bytes per parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import PrivacyBudgetError
from mpc_fl.federation.planning import mechanism_of
from tests.support.harness import run_parties

pytestmark = pytest.mark.processes
HOSPITALS = ["hospital-0", "hospital-1", "hospital-2"]
STEPS = 2
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 16, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "training": {"rounds": 1, "local_steps": STEPS, "batch_size": 12, "per_sample_gradients": "vmap"},
    "privacy": {"mechanism": "distributed", "delta": 1e-3, "noise_multiplier": 1.5, "colluders": 1},
}


def _config(**privacy: Any) -> Config:
    return parse_config({**SETTINGS, "privacy": {**SETTINGS["privacy"], **privacy}}, "test")


class KeepFrames:
    """Keeps the shares that the aggregator receives, in a module variable of its process."""

    shares: list[tuple[str, np.ndarray]] = []

    def __call__(self, peer: str, frame: Any) -> None:
        if frame.tag.startswith("summand"):
            self.shares.append((peer, frame.payload.numpy().copy()))


def steps(links: Any, directory: str) -> dict[str, Any]:
    import mpc_fl.federation.federated_sgd as federated_sgd
    from mpc_fl.audit.opening_record import OpeningRecord
    from mpc_fl.federation.aggregator_state import prepare_aggregator
    from mpc_fl.federation.attendance import RoundPlan
    from mpc_fl.federation.hospital_round import charge_round
    from mpc_fl.federation.hospital_state import join
    from mpc_fl.federation.planning import sum_rules
    from mpc_fl.learning.data.loading import load_hospital
    from mpc_fl.learning.models.parameters import flatten_parameters
    from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
    from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
    from tests.support.signatories import signatory_in

    config = _config()
    rules, aggregator = sum_rules(config), prepare_aggregator(config)
    model, mechanism = aggregator.model, aggregator.mechanism
    assert mechanism is not None
    result: dict[str, Any] = {"ring": mechanism.ring_bits, "parameters": mechanism.parameters}
    starts = {name: links.key_fingerprint(name) for name in HOSPITALS}
    plan = RoundPlan(1, 0, tuple(HOSPITALS), starts, (), 128, False)
    with CrypTenRuntime(links, [*HOSPITALS, "aggregator"], None, 24) as runtime:
        signatory = signatory_in(Path(directory), links.name, [*HOSPITALS, "aggregator"])
        domain = runtime.domain(OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name), signatory)
        links.set_phase("steps")
        if links.name == "aggregator":
            opened: list[torch.Tensor] = []
            mean_gradient = federated_sgd.mean_gradient
            federated_sgd.mean_gradient = lambda m, total: opened.append(total.clone()) or mean_gradient(m, total)
            federated_sgd.aggregator_steps(aggregator, domain, rules, plan)
            result |= {"opened": opened, "shares": KeepFrames.shares}
        else:
            summands: list[torch.Tensor] = []
            exact: list[torch.Tensor] = []
            noised_share = federated_sgd.noised_share

            def kept(m: Any, total: Any, seed: Any, threads: int) -> Any:
                exact.append(total.inside_protocol().clone())
                share = noised_share(m, total, seed, threads)
                summands.append(share.inside_protocol().clone())
                return share

            federated_sgd.noised_share = kept
            rank = int(links.name[-1])
            data, held_out = load_hospital(config, rank, "train"), load_hospital(config, rank, "test")
            hospital = join(config, rank, data, held_out, PrivacyLedger(Path(directory) / f"{rank}.json", links.name))
            charge_round(hospital, 1)
            taken = federated_sgd.hospital_steps(hospital, domain, rules, plan, lambda *_: None)
            model = hospital.model
            assert not isinstance(taken, str) and taken[0] == tuple(HOSPITALS)
            kept_steps = taken[1]
            sent = links.traffic["round 1 aggregation"]["aggregator"].bytes_sent
            result |= {"summands": summands, "exact": exact, "sent": sent, "steps": kept_steps}
    result["model"] = flatten_parameters(model)
    return {name: _as_arrays(value) for name, value in result.items()}


def _as_arrays(value: Any) -> Any:
    """Tensors as numpy arrays, which a queue copies; tensors it would share through a process that is about to end."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return [_as_arrays(item) for item in value] if isinstance(value, list) else value


def test_the_opened_sum_is_exact_noised_and_costs_four_bytes_per_parameter(tmp_path: Path) -> None:
    names = [*HOSPITALS, "aggregator"]
    results = run_parties(steps, names, tmp_path, str(tmp_path), observer=KeepFrames())
    central, parameters = results["aggregator"], results["aggregator"]["parameters"]
    assert central["ring"] == 32
    mechanism = mechanism_of(_config(), parameters)
    for step in range(STEPS):
        summands = [results[name]["summands"][step] for name in HOSPITALS]
        assert all(summand.dtype == np.int32 for summand in summands)
        total = sum(summand.astype(np.int64) for summand in summands)
        assert np.array_equal(central["opened"][step], total), "the integer sum equals the plaintext integer sum"
        # Noise: with t = 1 each of 3 hospitals adds half of sigma^2, so the sum carries 3/2 sigma^2.
        noise = (total - sum(results[name]["exact"][step].astype(np.int64) for name in HOSPITALS)).astype(np.float64)
        sigma = mechanism.noise_multiplier * mechanism.sensitivity
        ratio = float(np.square(noise).mean()) / (1.5 * sigma**2)
        spread = (2 / parameters) ** 0.5
        assert abs(ratio - 1) < 6 * spread  # six standard deviations: false-alarm rate 2e-9
    for name in HOSPITALS:
        assert np.array_equal(results[name]["model"], central["model"])
        assert STEPS * 4 * parameters <= results[name]["sent"] < STEPS * (4 * parameters + 300)
        shares = [values for peer, values in central["shares"] if peer == name]
        assert len(shares) == STEPS
        for share, summand in zip(shares, results[name]["summands"], strict=True):
            digits = np.bincount((share.view(np.uint32) >> 24).astype(np.int64), minlength=256)
            assert stats.chisquare(digits).pvalue > 1e-7  # uniform; false-alarm rate 1e-7
            assert abs(np.corrcoef(share.astype(np.float64), summand.astype(np.float64))[0, 1]) < 5.4 / parameters**0.5
        assert results[name]["steps"].count == STEPS


def test_the_mechanism_is_public_and_calibrated_for_the_smallest_hospital() -> None:
    from mpc_fl.federation.planning import plan_release
    from mpc_fl.learning.privacy.accounting import epsilon_of

    config = _config(noise_multiplier=None, smallest_hospital=30, epsilon=8.0)
    released = plan_release(config, 30, [], "hospital-0")
    assert released is not None
    assert 7.9 < epsilon_of([released], 1e-3) <= 8.0
    # The rate is that of the smallest hospital everywhere: how many patients there are is nobody's to see.
    assert plan_release(config, 60, [], "hospital-1") == released
    mechanism = mechanism_of(config)
    assert mechanism.divisor == 12 and mechanism.expected_patients == 12 / 30 * 120  # four times the smallest hospital
    with pytest.raises(PrivacyBudgetError, match="fewer patients than privacy.smallest_hospital"):
        plan_release(config, 29, [], "hospital-2")
    with pytest.raises(PrivacyBudgetError, match="more patients than privacy.largest_hospital, 120"):
        plan_release(config, 121, [], "hospital-2")
