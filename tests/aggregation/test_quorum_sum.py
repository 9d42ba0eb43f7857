"""Closed sums over links in memory: exact over those admitted, closed to all others, recorded alike, without CrypTen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.aggregation.quorum_sum import collect, contribute
from mpc_fl.aggregation.rules import AgreedSum, Description, Rules
from mpc_fl.audit.opening_record import OpeningRecord
from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.signatory import Signatory
from mpc_fl.errors import MpcFlError
from mpc_fl.links.in_memory import InMemoryNetwork
from mpc_fl.sharing.closed_sum import ClosedSum, SummandMasks
from mpc_fl.sharing.opening import SecretDomain
from tests.support.harness import run_parties_in_memory
from tests.support.signatories import signatories

HOSPITALS = ("hospital-0", "hospital-1", "hospital-2", "hospital-3")
AGGREGATOR = "aggregator"
WORLD = [*HOSPITALS, AGGREGATOR]


@dataclass(frozen=True)
class Refusing:
    """A check that lets every hospital pass but those named."""

    refused: tuple[str, ...]

    def at_hospital(self, domain: SecretDomain, masks: SummandMasks, word: Mapping[str, Any]) -> None:
        assert word["hospitals"] == list(HOSPITALS)

    def at_opener(self, domain: SecretDomain, closed: ClosedSum, say_check: Callable[..., None]) -> list[str]:
        say_check(hospitals=list(closed.present))
        return [name for name in closed.present if name not in self.refused]

    def require_total(self, total: torch.Tensor, admitted: Sequence[str], why: str) -> None:
        assert self.refused != HOSPITALS[:2] and why == "round 1" and not set(admitted) & set(self.refused)


def _summand(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[1, -2, 3], [torch.iinfo(dtype).max, 5, 6]], dtype=dtype) * (HOSPITALS.index(name) + 1)


def one_sum(links: Any, directory: str, rules: Rules, dtype: torch.dtype, signatory: dict[str, Signatory]) -> Any:
    record = OpeningRecord(Path(directory) / f"{links.name}.jsonl", links.name)
    domain = SecretDomain(links, WORLD, record, signatory=signatory[links.name])
    agreed = AgreedSum(HOSPITALS, ("update", 1), Description("mean update", "round 1"))
    if links.name == AGGREGATOR:
        starts = {name: links.key_fingerprint(name) for name in HOSPITALS}
        admitted, total = collect(domain, rules, agreed, starts, dtype, (2, 3))
        return admitted, total.tolist(), False
    released: list[bool] = []
    encoded = Private("update", _summand(links.name, dtype))
    admitted = contribute(domain, rules, agreed, encoded, lambda: released.append(True))
    return admitted, None, bool(released)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("refused", [(), ("hospital-1",)])
def test_the_sum_over_those_admitted_is_exact_and_recorded_alike(
    refused: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    rules = Rules(AGGREGATOR, HOSPITALS, 3, 2, 60.0, Refusing(refused))
    signatory = signatories(WORLD, tmp_path / "identities")
    results = run_parties_in_memory(one_sum, WORLD, str(tmp_path), rules, dtype, signatory)
    admitted = tuple(name for name in HOSPITALS if name not in refused)
    expected = torch.stack([_summand(name, dtype) for name in admitted]).sum(0, dtype=dtype)
    assert results[AGGREGATOR] == (admitted, expected.tolist(), False)
    for name in HOSPITALS:
        # Every summand was sent, and so released; only those in the sum open it.
        assert results[name] == (admitted, None, True)
    for name in WORLD:
        path = tmp_path / f"{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        about = [(each["what"], each["why"], each["shape"], each["to"], each["among"]) for each in records]
        stated = ("mean update", "round 1", [2, 3], [AGGREGATOR], [*admitted, AGGREGATOR])
        assert about == ([] if name in refused else [stated])


def test_without_closing_masks_all_confirm_before_they_send(tmp_path: Path) -> None:
    signatory, sent = signatories(WORLD, tmp_path / "identities"), list[str]()

    def watch(network: InMemoryNetwork) -> None:
        network.watch(lambda sender, _, frame: sent.append(f"{sender} {frame.tag}"))

    rules = Rules(AGGREGATOR, HOSPITALS, 4, 0, 60.0)
    results = run_parties_in_memory(one_sum, WORLD, str(tmp_path), rules, torch.int32, signatory, prepare=watch)
    expected = torch.stack([_summand(name, torch.int32) for name in HOSPITALS]).sum(0, dtype=torch.int32)
    assert results[AGGREGATOR] == (HOSPITALS, expected.tolist(), False)
    summands = [at for at, message in enumerate(sent) if " summand " in message]
    confirmed = [at for at, message in enumerate(sent) if " ready " in message]
    assert len(summands) == len(confirmed) == 4 and max(confirmed) < min(summands)
    assert not [message for message in sent if " keys " in message]


def too_few(links: Any, directory: str, signatory: dict[str, Signatory]) -> str:
    rules = Rules(AGGREGATOR, HOSPITALS, 3, 2, 60.0, Refusing(HOSPITALS[:2]))
    try:
        one_sum(links, directory, rules, torch.int32, signatory)
    except MpcFlError as error:
        return str(error)
    return "opened"


def test_fewer_than_the_quorum_open_nothing(tmp_path: Path) -> None:
    signatory = signatories(WORLD, tmp_path / "identities")

    def at_the_aggregator(links: Any) -> str:
        said = too_few(links, str(tmp_path), signatory)
        if links.name == AGGREGATOR:
            for name in HOSPITALS:  # as a run that ends: the hospitals wait for its next word
                links.send_object(name, "word", {"word": "end"})
        return said

    results = run_parties_in_memory(at_the_aggregator, WORLD)
    assert "the quorum is 3" in results[AGGREGATOR]
    assert all("said 'end'" in results[name] for name in HOSPITALS)
    for name in WORLD:
        path = tmp_path / f"{name}.jsonl"
        assert not path.exists() or path.read_text() == ""


def test_who_is_left_out_hears_whether_it_was_late_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = Rules(AGGREGATOR, HOSPITALS, 3, 2, 60.0, Refusing(("hospital-1",)))
    signatory = signatories(WORLD, tmp_path / "identities")
    run_parties_in_memory(one_sum, WORLD, str(tmp_path), rules, torch.int32, signatory)
    said = [record.getMessage() for record in caplog.records if "was left out" in record.getMessage()]
    assert said == [
        "this hospital was left out of 'round 1': its update was not shown to be within the norm bound"
    ]  # and nobody was late


def _again(links: Any, directory: str, signatory: dict[str, Signatory], only: Mapping[str, tuple[str, ...]]) -> str:
    """An exact sum over all, where some parties have begun to open it over others before."""
    domain = SecretDomain(
        links, WORLD, OpeningRecord(Path(directory) / links.name, links.name), signatory=signatory[links.name]
    )
    rules, about = Rules(AGGREGATOR, HOSPITALS, 2, 2, 60.0), Description("number of patients", "total")
    agreed = AgreedSum(HOSPITALS, ("patients", 1), about, only=only.get(links.name))
    try:
        if links.name == AGGREGATOR:
            starts = {name: links.key_fingerprint(name) for name in HOSPITALS}
            collect(domain, rules, agreed, starts, torch.int64, (1,))
        else:
            contribute(domain, rules, agreed, Private("patients", torch.tensor([7])))
    except MpcFlError as error:
        for name in HOSPITALS if links.name == AGGREGATOR else ():
            links.send_object(name, "word", {"word": "end"})
        links.interrupt(error)  # as a run that ends
        return str(error)
    return "opened"


@pytest.mark.parametrize("who", ["hospital-0", AGGREGATOR])
def test_an_exact_sum_is_not_opened_over_others_than_it_was_begun_over(who: str, tmp_path: Path) -> None:
    """The difference of the two would be what one hospital has."""
    signatory = signatories(WORLD, tmp_path / "identities")
    others = HOSPITALS[:-1]

    def party(links: Any) -> str:
        said = _again(links, str(tmp_path), signatory, {who: others})
        if links.name == who and who != AGGREGATOR:
            links.send_object(AGGREGATOR, "confirm patients 1 0", {"confirmation": ""})  # it must refuse, too
        return said

    results = run_parties_in_memory(party, WORLD, tolerated=HOSPITALS)
    assert "was begun over hospital-0, hospital-1, hospital-2; over others" in results[who]
    assert "opened" not in results.values()
    for name in HOSPITALS:
        assert not (tmp_path / name).exists() or not (tmp_path / name).read_text(), "and nothing was recorded"


def test_an_exact_sum_is_opened_again_over_the_same_hospitals(tmp_path: Path) -> None:
    signatory = signatories(WORLD, tmp_path / "identities")
    results = run_parties_in_memory(_again, WORLD, str(tmp_path), signatory, dict.fromkeys(WORLD, HOSPITALS))
    assert set(results.values()) == {"opened"}
