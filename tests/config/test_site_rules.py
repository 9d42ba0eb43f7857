"""What a site allows: each rule is held against the configuration, and the line that is broken is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpc_fl.config.config import Config
from mpc_fl.config.site_rules import read_rules, require_allowed, require_trusted, rules_of
from mpc_fl.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "site_rules.yaml"
NOISED: dict[str, Any] = {"evaluation": {"noise_multiplier": 8.0}}
UNPROTECTED: dict[str, Any] = {"privacy": {"mechanism": "none"}}
VALIDATED: dict[str, Any] = {
    "data": {"validation_fraction": 0.2}, "evaluation": {"public_validation": True}
}  # fmt: skip

# A rule, a configuration that breaks it, one that does not, and what is said.
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("tasks: [train]", "tasks", {"task": "infer"}, {}, "task infer"),
    ("models: [mlp]", "models", {}, {"model": {"architecture": "mlp"}}, "model.architecture"),
    ("largest_rounds: 2", "largest_rounds", {"training": {"rounds": 3}}, {"training": {"rounds": 2}}, "rounds 3"),
    ("smallest_quorum: 3", "smallest_quorum", {"federation": {"quorum": 2}}, {}, "sums over 2 hospitals"),
    ("privacy: {mechanisms: [local]}", "privacy.mechanisms", UNPROTECTED, {}, "privacy.mechanism none"),
    ("privacy: {largest_epsilon: 7}", "privacy.largest_epsilon", {}, {"privacy": {"epsilon": 7.0}}, "epsilon 8"),
    ("privacy: {largest_epsilon: 7}", "privacy.largest_epsilon", UNPROTECTED, {"privacy": {"epsilon": 1.0}}, "without"),
    ("privacy: {largest_delta: 1.0e-5}", "privacy.largest_delta", {}, {"privacy": {"delta": 1e-5}}, "delta 0.0001"),
    ("privacy: {units: [patient]}", "privacy.units", {"data": {"unit": "image"}}, {}, "data.unit image"),
    ("opened: {evaluation: noised}", "opened.evaluation", {}, NOISED, "exact evaluation counts"),
    ("opened: {evaluation: nothing}", "opened.evaluation", NOISED, {}, "noised evaluation counts"),
    ("opened: {validation: noised}", "opened.validation", VALIDATED, {}, "exact validation counts"),
    ("opened: {patient_count: false}", "opened.patient_count", UNPROTECTED, {}, "number of patients"),
    ("opened: {diagnosis: label}", "opened.diagnosis", {"task": "infer"}, {"task": "serve"}, "opens logits"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "broken", "kept", "words"), CASES)
def test_a_broken_rule_is_named_with_its_line(
    tmp_path: Path, rule: str, name: str, broken: dict[str, Any], kept: dict[str, Any], words: str
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(f"# of this site\n\n{rule}\n")
    file = read_rules(path)
    with pytest.raises(ConfigError) as refused:
        require_allowed(Config().with_values(**broken), file)
    assert words in refused.value.what and f"{path} line 3 ({name})" in refused.value.what
    if "nothing" not in rule:
        require_allowed(Config().with_values(**kept), file)


def test_nothing_is_forbidden_by_no_rule_and_by_the_rules_of_others(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("# nothing yet\n")
    require_allowed(Config().with_values(**UNPROTECTED), read_rules(path))
    assert rules_of(Config()) is None
    assert rules_of(Config().with_values(site={"rules": str(path)})) is not None
    assert Config().with_values(site={"rules": str(path)}).digest() == Config().digest()


def test_only_named_certificates_are_trusted(tmp_path: Path) -> None:
    path, own = tmp_path / "rules.yaml", "ab" * 32
    path.write_text(f"largest_rounds: 5\nleaders:\n  - '{':'.join(['AB'] * 32)}'\n")
    file = read_rules(path)
    require_trusted(file, "leaders", own)
    require_trusted(file, "authorities", "cd" * 32)  # no rule about these
    with pytest.raises(ConfigError, match=r"the aggregator with certificate cd.* line 2 \(leaders\)"):
        require_trusted(file, "leaders", "cd" * 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: [train]\nprivacy:\n  largest_epsilom: 3\n", "line 3: privacy.largest_epsilom: Extra inputs"),
        ("privacy:\n  largest_epsilon: none\n", "line 2: privacy.largest_epsilon"),
        ("tasks: [train]\ntasks: [infer]\n", "line 2: a key comes twice"),
        ("leaders: [abc]\n", "line 1: leaders"),
        ("- train\n", "line 1: the file"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_rules(path)
    assert words in refused.value.what
    with pytest.raises(ConfigError, match="cannot read site.rules"):
        read_rules(tmp_path / "none.yaml")


def test_the_example_allows_what_it_says() -> None:
    file = read_rules(EXAMPLE)
    allowed = Config().with_values(model={"architecture": file.rules.models[0]} if file.rules.models else {})
    require_allowed(allowed, file)
    with pytest.raises(ConfigError, match="privacy.epsilon 9"):
        require_allowed(allowed.with_values(privacy={"epsilon": 9.0}), file)
