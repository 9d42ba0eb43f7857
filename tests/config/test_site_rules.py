"""What a site allows: each rule is held against the configuration, and the line that is broken is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

from mpc_fl.apps.first_configuration import Answers, first_configuration
from mpc_fl.apps.runs.party_process import require_site_allows
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.loading import load_config
from mpc_fl.config.settings import takes_text
from mpc_fl.config.site_rules import RuleFile, broken_rules, read_rules, refusal, require_trusted, rules_of
from mpc_fl.errors import ConfigError
from mpc_fl.parsing import parse_yaml
from mpc_fl.roles import hospital_name

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "site_rules.yaml"
NOISED: dict[str, Any] = {"evaluation": {"noise_multiplier": 8.0}}
UNPROTECTED: dict[str, Any] = {"privacy": {"mechanism": "none"}}
VALIDATED: dict[str, Any] = {
    "data": {"validation_fraction": 0.2}, "evaluation": {"public_validation": True}
}  # fmt: skip


def require_allowed(config: Config, file: RuleFile) -> None:
    """As a party asks before a run."""
    if broken := broken_rules(config, file):
        raise refusal(broken)


def TABLE_OF(*names: str, **table: Any) -> dict[str, Any]:  # noqa: N802 - a part of cases
    return {"data": {"source": "csv", "table": {"columns": [{"name": name} for name in names], **table}}}


def PATTERN(pattern: str | None) -> dict[str, Any]:  # noqa: N802 - a part of cases
    return {"data": {"source": "images", "patient_pattern": pattern}}


def BY(groups: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - a part of cases
    return {"evaluation": {"groups": groups}}


TABLE = TABLE_OF("age")

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
    ("opened: {incomplete: false}", "opened.incomplete", {"federation": {"evaluate_incomplete": True}}, {}, "some of"),
    ("opened: {shared_patients: false}", "opened.shared_patients", {"data": {"shared_patients": "keep"}}, {}, "who also train"),
    ("opened: {groups: [age]}", "opened.groups", BY({"sex": ["f"]}), BY({"age_bands": [18]}), "by sex"),
    ("data: {sources: [csv]}", "data.sources", {"data": {"source": "images"}}, TABLE, "data.source images"),
    ("data: {columns: [Age]}", "data.columns", TABLE_OF("age", "mrn"), TABLE_OF("age"), "column 'mrn'"),
    ("data: {columns: [age]}", "data.columns", {"data": {"source": "csv", "table": {"features": 3}}}, TABLE, "what is read"),
    ("data: {labels: [ill]}", "data.labels", TABLE_OF("age", label_column="hiv"), TABLE_OF("age", label_column="ILL"), "'hiv'"),
    ("data: {patient_columns: [pid]}", "data.patient_columns", TABLE_OF("age", patient_column="visit"), TABLE, "'visit'"),
    ("data: {patient_patterns: ['(P[0-9]+)_']}", "data.patient_patterns", PATTERN("(.*)"), PATTERN("(P[0-9]+)_"), "(.*)"),
    ("data: {patient_patterns: []}", "data.patient_patterns", PATTERN("(.)"), PATTERN(None), "(.)"),
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
    assert rules_of(Config()) == ()
    assert [file.path for file in rules_of(Config().with_values(site={"rules": str(path)}))] == [path]
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
        ("tasks: [train]\ntasks: [infer]\n", "line 2: the key 'tasks' comes twice"),
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


def test_an_empty_file_is_no_rules(tmp_path: Path) -> None:
    """Cut off by a full disk it would allow everything."""
    path = tmp_path / "rules.yaml"
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        read_rules(path)


def test_rules_of_the_user_hold_whatever_the_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator writes the configuration: without site.rules, or with a file of its own that allows everything."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own, theirs = tmp_path / "mpc-fl" / "site_rules.yaml", tmp_path / "theirs.yaml"
    own.parent.mkdir()
    own.write_text("privacy: {largest_epsilon: 2}\n")
    theirs.write_text("# all\n")
    for site in ({}, {"rules": str(theirs)}, {"rules": str(own)}):
        with pytest.raises(ConfigError, match=r"epsilon 8: .*mpc-fl/site_rules.yaml line 1"):
            require_site_allows(Config().with_values(site=site))
    own.unlink()
    assert rules_of(Config()) == ()
    own.symlink_to(tmp_path / "gone")  # a share that is not there now
    with pytest.raises(ConfigError, match="cannot read site.rules"):
        rules_of(Config())


def test_all_runs_count_in_the_privacy_ledger_of_the_site(tmp_path: Path) -> None:
    """An epsilon for each run bounds nothing over runs: a fresh --out, another directory, or another name began anew."""
    ledgers, path = tmp_path / "ledgers", tmp_path / "rules.yaml"
    path.write_text(f"privacy:\n  largest_epsilon: 8\n  ledger: {ledgers}\n")

    def run(name: str | None = "hospital-0", by_itself: bool = True, **site: Any) -> None:
        require_site_allows(Config().with_values(site={"rules": str(path), **site}), name, by_itself)

    other = {"privacy_ledger": str(tmp_path / "other")}
    for site in ({}, other):
        for name in ("hospital-0", None):
            with pytest.raises(ConfigError, match=r"does not count in its privacy ledger.* line 3 \(privacy.ledger\)"):
                run(name, **site)
    run("aggregator")  # has no patients
    own: dict[str, Any] = {"privacy_ledger": f"{ledgers}/../ledgers"}
    run(**own)
    ledgers.mkdir()
    (ledgers / "hospital-0-privacy.sqlite3").touch()
    run(**own)
    for data_of in (None, "hospital", "federation"):  # which the coordinator may have set
        with pytest.raises(ConfigError, match="as hospital-1 beside the privacy ledger of hospital-0"):
            run("hospital-1", **own, data_of=data_of)
    run("hospital-1", by_itself=False, **own)  # hospitals of a simulation have one each
    path.write_text("privacy:\n  ledger: ledgers\n")
    with pytest.raises(ConfigError, match="line 2: privacy.ledger: .*not an absolute path"):
        run()


def test_all_rules_that_a_run_breaks_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "mpc-fl" / "site_rules.yaml", tmp_path / "other.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own.parent.mkdir()
    own.write_text("models: [linear]\nlargest_rounds: 2\nprivacy:\n  largest_epsilon: 4\n")
    other.write_text(f"tasks: [infer]\nprivacy:\n  ledger: {tmp_path}/ledgers\n")
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "ledgers" / f"{hospital_name(1)}-privacy.sqlite3").touch()
    with pytest.raises(ConfigError) as refused:
        require_site_allows(Config().with_values(site={"rules": str(other)}), hospital_name(0), by_itself=True)
    assert "\n" not in str(refused.value)
    assert re.findall(r"(\w+\.yaml) line (\d) \(([a-z_.]+)\)", refused.value.what) == [
        ("site_rules.yaml", "1", "models"), ("site_rules.yaml", "2", "largest_rounds"),
        ("site_rules.yaml", "4", "privacy.largest_epsilon"), ("other.yaml", "1", "tasks"),
        ("other.yaml", "3", "privacy.ledger"), ("other.yaml", "3", "privacy.ledger"),
    ]  # fmt: skip


def test_a_line_of_many_broken_rules_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("data: {columns: [age]}\n")
    with pytest.raises(ConfigError) as refused:
        require_allowed(Config().with_values(**TABLE_OF(*(f"c{number}" for number in range(20)))), read_rules(path))
    assert re.search(r"'c7' of a table there: \S+ line 1 \(data.columns\); and 12 more$", refused.value.what)
    assert "'c8'" not in refused.value.what


def test_the_example_allows_what_it_says() -> None:
    file = read_rules(EXAMPLE)
    for architecture in file.rules.models or ():
        require_allowed(Config().with_values(model={"architecture": architecture}), file)
    with pytest.raises(ConfigError, match="privacy.epsilon 9"):
        require_allowed(Config().with_values(privacy={"epsilon": 9.0}), file)


REPOSITORY = EXAMPLE.parents[1]
SHIPPED = sorted(
    path
    for folder in ("configs", "examples")
    for path in (REPOSITORY / folder).rglob("*.yaml")
    if path not in (EXAMPLE, REPOSITORY / "examples" / "kubernetes.yaml")  # no configurations of runs
)
REFUSED = {"monai.yaml": ["models"], "timm.yaml": ["models"]}  # networks of others, as the example itself says


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_example_allows_what_is_shipped(path: Path) -> None:
    broken = broken_rules(load_config(path), read_rules(EXAMPLE))
    assert [each.rule for each in broken] == REFUSED.get(path.name, [])


@pytest.mark.parametrize("source", ["phantoms", "images", "csv"])
def test_the_example_allows_what_init_writes(source: Literal["phantoms", "images", "csv"]) -> None:
    text = first_configuration(Answers(source, patient_column="patient"))
    config = parse_config(parse_yaml(text, takes_text), "x")
    assert broken_rules(config, read_rules(EXAMPLE)) == []
