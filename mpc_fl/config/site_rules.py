"""What a site allows, in a file of its own (`site.rules`): held against the configuration before every run, and never sent.

The federation writes the configuration, and the site this file. A rule that is left out allows everything; a run that breaks one is
refused with the line of the file that it breaks. All of it is checked before anybody is dialled, but for `leaders`: which
certificate the aggregator has is known once the run begins, and checked before anything of the patients leaves.

A configuration that comes from others may leave `site.rules` out, or name another file. What stands in the file of this user
(`user_rules`) holds whatever the configuration says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from mpc_fl.config.columns import plain_name
from mpc_fl.config.config import Config
from mpc_fl.config.section import Count, Positive, Section
from mpc_fl.errors import ConfigError
from mpc_fl.parsing import parse_yaml, yaml_lines
from mpc_fl.roles import is_hospital

Opened = Literal["nothing", "noised", "exact"]
_OPENED: tuple[Opened, ...] = ("nothing", "noised", "exact")  # each allows those before it
_REVEALED = ("label", "logits")
_SHOWN = 60  # letters of what others wrote
_NAMED = 8  # rules that a run breaks, in one line


def _plain_fingerprint(text: str) -> str:
    """SHA-256 as openssl and `mpc-fl pki` write it: with colons or without, in either case."""
    plain = text.replace(":", "").lower()
    if len(plain) != 64 or any(digit not in "0123456789abcdef" for digit in plain):
        raise ValueError("not a SHA-256 fingerprint of 64 hexadecimal digits")
    return plain


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("not an absolute path: it must be the same wherever a run is started")
    return path


Fingerprint = Annotated[str, AfterValidator(_plain_fingerprint)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
_LEDGER_ENDS = ("-privacy.sqlite3", "-privacy.json")  # files of privacy ledgers, after the name of their hospital


class PrivacyRules(Section):
    """The least protection of this site's patients."""

    mechanisms: tuple[Literal["local", "distributed", "none"], ...] | None = Field(
        default=None, description="that a run may have; none is a run without differential privacy"
    )
    largest_epsilon: Positive | None = None
    largest_delta: Positive | None = None
    units: tuple[Literal["patient", "image"], ...] | None = Field(
        default=None, description="what privacy may be counted by"
    )
    ledger: AbsolutePath | None = Field(
        default=None, description="directory of the privacy ledger, in which all runs of this site are counted together"
    )


class DataRules(Section):
    """What of this site's records a run may read, and what may say whose they are."""

    sources: tuple[str, ...] | None = Field(default=None, description="values of data.source")
    columns: tuple[str, ...] | None = Field(default=None, description="columns of a table that may become features")
    labels: tuple[str, ...] | None = Field(default=None, description="columns of a table that may hold the class")
    patient_columns: tuple[str, ...] | None = Field(default=None, description="columns that may hold the patient")
    patient_patterns: tuple[str, ...] | None = Field(
        default=None,
        description="values of data.patient_pattern besides null: one that takes files for patients weakens epsilon",
    )


class OpeningRules(Section):
    """The most that may be opened of this site's patients."""

    evaluation: Opened | None = Field(default=None, description="of test patients")
    validation: Opened | None = Field(default=None, description="of validation patients")
    patient_count: bool = Field(
        default=True, description="the exact number of training patients of all hospitals together"
    )
    incomplete: bool = Field(
        default=True, description="whether test counts may be opened while hospitals are absent, which shows theirs"
    )
    shared_patients: bool = Field(
        default=True,
        description="whether counts may be opened of test patients who also train (data.shared_patients: keep)",
    )
    groups: tuple[Literal["sex", "age", "scanner", "site"], ...] | None = Field(
        default=None, description="by what test patients may be evaluated in groups (evaluation.groups)"
    )
    diagnosis: Literal["label", "logits"] | None = None


class SiteRules(Section):
    """The content of a rule file."""

    tasks: tuple[Literal["train", "simulate", "infer", "serve"], ...] | None = None
    models: tuple[str, ...] | None = Field(default=None, description="values of model.architecture")
    largest_rounds: Count | None = None
    smallest_quorum: Count | None = Field(default=None, description="fewest hospitals that a sum may be opened over")
    authorities: tuple[Fingerprint, ...] | None = Field(
        default=None, description="SHA-256 of the certificates of federations' authorities"
    )
    leaders: tuple[Fingerprint, ...] | None = Field(default=None, description="SHA-256 of certificates of aggregators")
    data: DataRules = DataRules()
    privacy: PrivacyRules = PrivacyRules()
    opened: OpeningRules = OpeningRules()


@dataclass(frozen=True)
class RuleFile:
    """A rule file that was read: its rules, and the line of each by its dotted name."""

    path: Path
    rules: SiteRules
    lines: Mapping[str, int]

    def line(self, rule: str) -> str:
        """Where the rule stands."""
        return f"{self.path} line {self.lines.get(rule, 1)} ({rule})"


@dataclass(frozen=True)
class Broken:
    """A rule that a run breaks: its dotted name, its file, and what of the run the site does not allow."""

    file: RuleFile
    rule: str
    what: str


def refusal(broken: Sequence[Broken]) -> ConfigError:
    """The error of a run that breaks these rules, at least one: all of them at once, or each would take a round of letters."""
    named = [f"{each.what}: {each.file.line(each.rule)}" for each in broken[:_NAMED]]
    more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    return ConfigError(
        f"this site does not allow {'; nor '.join(named)}{more}",
        "nothing was sent; agree on a run that the site allows, or have the site change its rules",
    )


def read_rules(path: Path) -> RuleFile:
    """Read a rule file. Raises `ConfigError` naming file and line for one that cannot be read or says what is no rule."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read site.rules {path}: {reason}", "give the path of a YAML file") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty, and would allow everything", "write the rules of this site anew")
    try:
        values = parse_yaml(text)
        lines = yaml_lines(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "correct it there; mind indentation and quotes") from None
    try:
        return RuleFile(path, SiteRules.model_validate({} if values is None else values), lines)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        keys = [part for part in first["loc"] if isinstance(part, str)]
        line = max(
            (lines[key] for key in (".".join(keys[: end + 1]) for end in range(len(keys))) if key in lines), default=1
        )
        raise ConfigError(
            f"{path} line {line}: {'.'.join(keys) or 'the file'}: {first['msg']}", "docs/site-rules.md names all rules"
        ) from None


def user_rules() -> Path | None:
    """The rule file of this user, $XDG_CONFIG_HOME/mpc-fl/site_rules.yaml, else below ~/.config; None where there is none.

    One that cannot be read is there, all the same. Raises `ConfigError` where that cannot be told.
    """
    try:
        settings = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        path = (settings if settings.is_absolute() else Path.home() / ".config") / "mpc-fl" / "site_rules.yaml"
        path.lstat()
        return path
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # the last: of a user without a home
        return None
    except OSError as error:
        raise ConfigError(f"cannot tell whether there is {path}: {error.strerror}", "check its permissions") from None


def rules_of(config: Config) -> tuple[RuleFile, ...]:
    """The rules that hold here: of this user, and of `site.rules`. Raises `ConfigError` as `read_rules`."""
    paths = dict.fromkeys(path for path in (user_rules(), config.site.rules) if path is not None)
    return tuple(map(read_rules, paths))


def broken_rules(config: Config, file: RuleFile, name: str | None = None) -> list[Broken]:
    """The rules that the configuration breaks, in their order, for the party `name`, or all here."""
    found = [Broken(file, rule, what) for rule, what in _broken(config, file.rules)]
    place, own = file.rules.privacy.ledger, config.site.privacy_ledger
    if not config.trains or place is None or not (name is None or is_hospital(name)):
        return found
    if own is None or os.path.realpath(own) != os.path.realpath(place):
        what = "a run that does not count in its privacy ledger, with site.privacy_ledger,"
        found.append(Broken(file, "privacy.ledger", what))
    return found


def other_names(file: RuleFile, name: str) -> list[Broken]:
    """That the site's privacy ledger is of another hospital than `name`; nothing where it is not.

    The coordinator says who a site is: under another name it would begin another ledger, of the same patients. Raises
    `ConfigError` where that cannot be told.
    """
    place = file.rules.privacy.ledger
    if place is None or not is_hospital(name):
        return []
    try:
        names = {entry.removesuffix(end) for entry in os.listdir(place) for end in _LEDGER_ENDS if entry.endswith(end)}
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot list {place}: {error.strerror}", "check its permissions") from None
    others = sorted(filter(is_hospital, names - {name}))
    what = f"a run as {name} beside the privacy ledger of {''.join(others[:1])}, of the same patients"
    return [Broken(file, "privacy.ledger", what)] if others else []


def distrusted(file: RuleFile, rule: Literal["authorities", "leaders"], fingerprint: str) -> list[Broken]:
    """That the certificate with this SHA-256 is none of those that the rule names, if it names any; nothing where it is."""
    trusted = file.rules.authorities if rule == "authorities" else file.rules.leaders
    if trusted is None or fingerprint in trusted:
        return []
    who = "the authority" if rule == "authorities" else "the aggregator"
    return [Broken(file, rule, f"{who} with certificate {fingerprint}")]


def require_trusted(file: RuleFile, rule: Literal["authorities", "leaders"], fingerprint: str) -> None:
    """Raise `ConfigError` where the rule distrusts the certificate with this SHA-256, as `distrusted`."""
    broken = distrusted(file, rule, fingerprint)
    if broken:
        raise refusal(broken)


def _broken(config: Config, rules: SiteRules) -> Iterator[tuple[str, str]]:
    if rules.tasks is not None and config.task not in rules.tasks:
        yield "tasks", f"task {config.task}"
    if rules.models is not None and config.model.architecture not in rules.models:
        yield "models", f"model.architecture {config.model.architecture}"
    if not config.trains:
        revealed = rules.opened.diagnosis
        if revealed is not None and _REVEALED.index(config.reveal) > _REVEALED.index(revealed):
            yield "opened.diagnosis", f"a diagnosis that opens {config.reveal}"
        return
    if rules.largest_rounds is not None and config.training.rounds > rules.largest_rounds:
        yield "largest_rounds", f"training.rounds {config.training.rounds}"
    if rules.smallest_quorum is not None and config.federation.quorum_size < rules.smallest_quorum:
        yield "smallest_quorum", f"sums over {config.federation.quorum_size} hospitals"
    yield from _broken_of_data(config, rules.data)
    yield from _broken_of_privacy(config, rules.privacy)
    yield from _broken_of_opened(config, rules.opened)


def _broken_of_data(config: Config, rules: DataRules) -> Iterator[tuple[str, str]]:
    data, table = config.data, config.data.table
    if rules.sources is not None and data.source not in rules.sources:
        yield "data.sources", f"data.source {data.source}"
    pattern = data.patient_pattern if data.source == "images" else None
    if rules.patient_patterns is not None and pattern is not None and pattern not in rules.patient_patterns:
        yield "data.patient_patterns", f"data.patient_pattern {pattern[:_SHOWN]}"
    if data.source != "csv":
        return
    if rules.columns is not None and table.columns is None:
        yield "data.columns", "a table of which data.table.columns does not say what is read"
    features = [column.name for column in table.columns or ()]
    own = [] if table.patient_column is None else [table.patient_column]
    read = (("columns", features, rules.columns), ("labels", [table.label_column], rules.labels),
            ("patient_columns", own, rules.patient_columns))  # fmt: skip
    for rule, names, allowed in read:
        plain = None if allowed is None else {plain_name(column) for column in allowed}
        for column in names:
            if plain is not None and plain_name(column) not in plain:
                yield f"data.{rule}", f"the column '{column[:_SHOWN]}' of a table there"


def _broken_of_privacy(config: Config, rules: PrivacyRules) -> Iterator[tuple[str, str]]:
    privacy, unit = config.privacy, config.data.unit
    if rules.mechanisms is not None and privacy.mechanism not in rules.mechanisms:
        yield "privacy.mechanisms", f"privacy.mechanism {privacy.mechanism}"
    if privacy.mechanism == "none":
        for rule in ("largest_epsilon", "largest_delta", "units"):
            if getattr(rules, rule) is not None:
                yield f"privacy.{rule}", "a run without differential privacy, which has no epsilon"
    if rules.largest_epsilon is not None and privacy.epsilon > rules.largest_epsilon:
        yield "privacy.largest_epsilon", f"privacy.epsilon {privacy.epsilon:g}"
    if rules.largest_delta is not None and privacy.delta > rules.largest_delta:
        yield "privacy.largest_delta", f"privacy.delta {privacy.delta:g}"
    if rules.units is not None and unit not in rules.units:
        yield "privacy.units", f"data.unit {unit}"


def _broken_of_opened(config: Config, rules: OpeningRules) -> Iterator[tuple[str, str]]:
    of_test: Opened = "nothing"
    if config.evaluation.test:
        of_test = "exact" if config.evaluation_noise("test") is None else "noised"
    of_validation: Opened = "nothing"
    if config.data.validation_fraction:
        of_validation = "exact" if config.evaluation_noise("validation") is None else "noised"
    for rule, allowed, opened in (
        ("evaluation", rules.evaluation, of_test),
        ("validation", rules.validation, of_validation),
    ):
        if allowed is not None and _OPENED.index(opened) > _OPENED.index(allowed):
            yield f"opened.{rule}", f"{opened} {rule} counts"
    for attribute in config.evaluation.groups.attributes:
        if rules.groups is not None and attribute not in rules.groups:
            yield "opened.groups", f"groups of test patients by {attribute}"
    if not rules.incomplete and config.federation.evaluate_incomplete:
        yield "opened.incomplete", "evaluation of some of the hospitals (federation.evaluate_incomplete)"
    if not rules.shared_patients and config.data.shared_patients == "keep":
        yield "opened.shared_patients", "counts of test patients who also train (data.shared_patients keep)"
    if not rules.patient_count and config.counts_patients:
        yield "opened.patient_count", "that the number of patients is opened"
