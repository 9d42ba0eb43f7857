"""The text of a model card, from facts made up by hand: what is claimed, and what is not."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.apps.estimates import NoPrivacy, PlannedPrivacy
from mpc_fl.apps.group_scores import GroupScores
from mpc_fl.apps.model_card import CardFacts, SignedModel, card_text
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.opening_record import Opening
from mpc_fl.config.config import Config, parse_config
from mpc_fl.federation.noised_evaluation import NoisedEvaluation
from mpc_fl.learning.models.evaluation import evaluate_locally
from mpc_fl.learning.models.shares import wilson_interval

PARTIES = ("hospital-0", "hospital-1", "aggregator")
DIGEST, SEAL = "ab" * 32, "cd" * 32


def scores(rights: tuple[int, ...] = (90, 70, 20), of: tuple[int, ...] = (100, 100, 40)) -> Scores:
    """Of each class so many records named rightly; all others are taken for the next class."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(of)])
    named = torch.cat(
        [
            torch.cat([torch.full((right,), label), torch.full((count - right,), (label + 1) % len(of))])
            for label, (right, count) in enumerate(zip(rights, of, strict=True))
        ]
    )
    return typed(Scores, evaluate_locally(torch.nn.functional.one_hot(named, len(of)).float(), labels).to_json(), "x")


def opening(number: int) -> Opening:
    return Opening("sum of weighted updates", f"round {number}: mean update", (1000,), ("aggregator",), PARTIES)


def facts(values: dict[str, Any] | None = None, **changes: Any) -> CardFacts:
    privacy = PlannedPrivacy("a hospital", 400, 0.25, 50, 1.5, 7.2, 7.9, 8.0, 1e-4)
    found = CardFacts(
        config=parse_config(values or {}, "test"),
        sha256=DIGEST,
        parameters=1234,
        rounds=5,
        privacy=privacy,
        final=scores(),
        evaluated_round=5,
        signed=SignedModel(SEAL, PARTIES, DIGEST, "ef" * 32, tuple(opening(number) for number in range(1, 6))),
        origins={},
    )
    return replace(found, **changes)


def rows(text: str) -> dict[str, list[str]]:
    """Lines of all tables by their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0].strip(): line[1:] for line in cells}


def test_the_claim_is_what_the_accountant_computed_and_names_its_unit() -> None:
    said = rows(card_text(facts()))
    assert said["Epsilon, at most"][0].startswith("8 over all runs")
    assert said["Epsilon of this run alone"] == ["7.200; 7.900 if all spare rounds (1) are used"]
    assert (said["Delta"], said["Accountant"]) == (["0.0001"], ["pld"])
    assert said["Unit"][0].startswith("one training patient of one hospital")
    assert rows(card_text(facts({"data": {"unit": "image"}})))["Unit"][0].endswith(
        "per image, not per patient (data.unit: image)"
    )
    assert said["Steps"] == ["50, each draws a patient with probability 0.25"]


def test_without_a_mechanism_no_epsilon_is_named() -> None:
    text = card_text(facts({"privacy": {"mechanism": "none"}}, privacy=NoPrivacy("a hospital", 400)))
    assert "No differential privacy" in text and "Epsilon of this run" not in text


def test_exact_evaluation_is_said_to_protect_no_test_patient_and_noised_evaluation_is_charged() -> None:
    assert "Test patients are counted exactly: this claim is not for them." in card_text(facts())
    noised = NoisedEvaluation(torch.tensor([[80.0, 4.0], [6.0, 60.0]]), 3.0).to_json()
    values = {"evaluation": {"noise_multiplier": 4.0}, "data": {"classes": ["sick", "well"]}}
    text = card_text(facts(values, final=typed(Scores, noised, "x")))
    assert "carries noise of 4 times" in text and "counted exactly" not in text
    assert "counted with noise of deviation 3.0" in text and rows(text)["sick"][-1] == "not opened"


def test_a_fixed_sampling_order_and_what_only_a_ledger_knows_are_said() -> None:
    assert "no epsilon holds against anyone who knows that seed" in card_text(facts({"training": {"sampling_seed": 1}}))
    assert "before added more noise" in card_text(facts())
    agreed = card_text(facts({"privacy": {"noise_multiplier": 1.5}}))
    assert "The noise multiplier is the same at all hospitals." in agreed
    assert "no bound holds for them" in agreed


def test_results_by_class_have_wilsons_intervals_and_a_small_class_is_named() -> None:
    text = card_text(facts())
    low, high = wilson_interval(0.9, 100)
    assert rows(text)["normal"][:2] == ["100", f"90.0 % ({100 * low:.1f} % to {100 * high:.1f} %)"]
    assert "fewer than 100 of viral (40)" in text
    assert "not shown to be better" not in text
    assert "not shown to be better" in card_text(facts(final=scores((40, 30, 10))))


def test_the_loader_of_a_site_is_named() -> None:
    assert "the loader our\\_archive gives at each hospital" in card_text(facts({"data": {"source": "our_archive"}}))


def test_noise_widens_the_intervals_of_classes() -> None:
    counts = torch.tensor([[80.0, 20.0], [10.0, 90.0]])
    values = {"evaluation": {"noise_multiplier": 4.0}, "data": {"classes": ["sick", "well"]}}

    def width(deviation: float) -> float:
        final = typed(Scores, NoisedEvaluation(counts, deviation).to_json(), "x")
        found = re.search(r"\(([\d.]+) % to ([\d.]+) %\)", rows(card_text(facts(values, final=final)))["sick"][1])
        assert found is not None
        return float(found.group(2)) - float(found.group(1))

    assert width(0.5) < width(3.0) < width(10.0)


def test_a_result_of_an_earlier_round_and_none_at_all_are_said() -> None:
    assert "the model after round 3, not the last" in card_text(facts(evaluated_round=3))
    assert "nothing is shown about what this model can do" in card_text(facts(final=None, evaluated_round=None))


def test_what_was_opened_is_that_of_the_signed_ledger_equal_ones_together() -> None:
    text = card_text(facts())
    assert "| sum of weighted updates | each round: mean update | 1000 | aggregator | 5 |" in text
    assert SEAL in text and DIGEST in text
    steps = tuple(replace(opening(1), why=f"round {r} step {s}: noised gradient") for r in (1, 2) for s in (1, 2, 3))
    text = card_text(facts(signed=SignedModel(SEAL, PARTIES, DIGEST, "ef" * 32, steps)))
    assert "| sum of weighted updates | each step: noised gradient | 1000 | aggregator | 6 |" in text
    assert "who trained it is not shown" in card_text(facts(signed=None))


def test_every_setting_of_training_is_in_it_and_no_file_of_this_machine() -> None:
    config = parse_config({"site": {"data": "/secret/place", "weights": "/secret/weights"}}, "test")
    text = card_text(replace(facts(), config=config))
    assert {*Config().training.model_dump(), *Config().model.model_dump()} - {"strategy"} <= set(rows(text))
    assert "/secret" not in text


@given(st.text(max_size=40).filter(lambda name: name.strip() and name not in "bc"))
def test_names_of_others_change_neither_tables_nor_the_page(name: str) -> None:
    first = name if name.isprintable() else "a"  # a configuration has no other classes
    text = card_text(facts({"data": {"classes": [first, "b", "c"]}, "name": name}, origins={"Initial weights": name}))
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len(heads) == 7 and heads[0].startswith("# Model card:")
    assert all(not re.search(r"(?<!\\)[<>]", line) for line in text.splitlines())
    table = [line for line in text.splitlines() if line.startswith("|") and " % (" in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in table) and len(table) == 3


@pytest.mark.parametrize("few", [1, 5, 200])
def test_wilsons_interval_holds_the_share(few: int) -> None:
    for right in range(few + 1):
        low, high = wilson_interval(right / few, few)
        assert 0 <= low <= right / few + 1e-12 and right / few - 1e-12 <= high <= 1


GROUPS: dict[str, Any] = {
    "fewest": 20,
    "withheld": {"age": ["unknown"], "scanner": ["<b>old</b>"]},
    "shown": [
        {
            "attribute": "sex",
            "group": group,
            "scores": json.loads(json.dumps(asdict(scores()))),
            "classes": [
                {"sensitivity": {"share": share, "low": share - 0.1, "high": share + 0.1, "of": 50},
                 "specificity": {"share": None, "low": None, "high": None, "of": 0}}
            ] * 3,
        }
        for group, share in (("female", 0.6), ("male", 0.8))
    ],
    "gaps": [
        {"attribute": "sex", "class_number": 0, "figure": "sensitivity", "worst": "female", "best": "male", "gap": 0.2,
         "low": 0.05, "high": 0.34, "chance": 0.004, "differs": "female"},
        {"attribute": "sex", "class_number": 1, "figure": "specificity", "worst": "male", "best": "female", "gap": 0.3,
         "low": -0.1, "high": 0.6, "chance": 0.4, "differs": "male"},
    ],
}  # fmt: skip


def test_groups_stand_with_intervals_gaps_and_what_is_withheld() -> None:
    text = card_text(facts(groups=typed(GroupScores, GROUPS, "x")))
    assert "| sex | female | 240 | 60.0 % (50.0 % to 70.0 %) |" in text
    assert "is withheld: age: unknown; scanner: \\<b\\>old" in text
    # The larger gap may be chance, so it is not told of as the other.
    assert "Gaps that are more than chance: female 20.0 % below male (sex; sensitivity, normal)." in text
    equal = {**GROUPS, "gaps": GROUPS["gaps"][1:]}
    assert "No gap is shown to be more than chance; the largest: male 30.0 %" in card_text(
        facts(groups=typed(GroupScores, equal, "x"))
    )
    nothing = card_text(facts(groups=typed(GroupScores, {"fewest": 20, "withheld": {"sex": ["female"]}}, "x")))
    assert "None is shown. A group that was not shown to have 20 patients is withheld: sex: female." in nothing
    assert "By group" not in card_text(facts())


def test_the_largest_gap_that_is_told_of_is_one_that_is_more_than_chance() -> None:
    found = typed(GroupScores, GROUPS, "x")
    assert found.largest is not None and found.largest.gap == 0.2
    assert found.described() == [
        "Groups: the largest gap is 20.0%, by sex: female below male in sensitivity of class 0 (from 0); more than chance.",
        "Withheld, not shown to have 20 patients: age unknown; scanner <b>old</b>.",
    ]
    assert typed(GroupScores, {"fewest": 2}, "x").described() == []
