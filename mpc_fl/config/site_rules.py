"""What a site allows, in a file of its own (`site.rules`): held against the configuration before every run, and never sent.

The federation writes the configuration, and the site this file. A rule that is left out allows everything; a run that breaks one is
refused with the line of the file that it breaks. All of it is checked before anybody is dialled, but for `leaders`: which
certificate the aggregator has is known once the run begins, and checked before anything of the patients leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from mpc_fl.config.config import Config
from mpc_fl.config.section import Count, Positive, Section
from mpc_fl.errors import ConfigError
from mpc_fl.parsing import parse_yaml, yaml_lines

Opened = Literal["nothing", "noised", "exact"]
_OPENED: tuple[Opened, ...] = ("nothing", "noised", "exact")  # each allows those before it
_REVEALED = ("label", "logits")


def _plain_fingerprint(text: str) -> str:
    """SHA-256 as openssl and `mpc-fl pki` write it: with colons or without, in either case."""
    plain = text.replace(":", "").lower()
    if len(plain) != 64 or any(digit not in "0123456789abcdef" for digit in plain):
        raise ValueError("not a SHA-256 fingerprint of 64 hexadecimal digits")
    return plain


Fingerprint = Annotated[str, AfterValidator(_plain_fingerprint)]


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


class OpeningRules(Section):
    """The most that may be opened of this site's patients."""

    evaluation: Opened | None = Field(default=None, description="of test patients")
    validation: Opened | None = Field(default=None, description="of validation patients")
    patient_count: bool = Field(
        default=True, description="the exact number of training patients of all hospitals together"
    )
    diagnosis: Literal["label", "logits"] | None = None


class SiteRules(Section):
    """The content of a rule file."""

    tasks: tuple[Literal["train", "infer", "serve"], ...] | None = None
    models: tuple[str, ...] | None = Field(default=None, description="values of model.architecture")
    largest_rounds: Count | None = None
    smallest_quorum: Count | None = Field(default=None, description="fewest hospitals that a sum may be opened over")
    authorities: tuple[Fingerprint, ...] | None = Field(
        default=None, description="SHA-256 of the certificates of federations' authorities"
    )
    leaders: tuple[Fingerprint, ...] | None = Field(default=None, description="SHA-256 of certificates of aggregators")
    privacy: PrivacyRules = PrivacyRules()
    opened: OpeningRules = OpeningRules()


@dataclass(frozen=True)
class RuleFile:
    """A rule file that was read: its rules, and the line of each by its dotted name."""

    path: Path
    rules: SiteRules
    lines: Mapping[str, int]

    def refusal(self, rule: str, what: str) -> ConfigError:
        """The error of a run that breaks a rule."""
        return ConfigError(
            f"this site does not allow {what}: {self.path} line {self.lines.get(rule, 1)} ({rule})",
            "nothing was sent; agree on a run that the site allows, or have the site change its rules",
        )


def read_rules(path: Path) -> RuleFile:
    """Read a rule file. Raises `ConfigError` naming file and line for one that cannot be read or says what is no rule."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read site.rules {path}: {reason}", "give the path of a YAML file") from None
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


def rules_of(config: Config) -> RuleFile | None:
    """The rules of this site; None where it has none. Raises `ConfigError` as `read_rules`."""
    return None if config.site.rules is None else read_rules(config.site.rules)


def require_allowed(config: Config, file: RuleFile) -> None:
    """Raise `ConfigError` naming the line of the first rule that the configuration breaks."""
    for rule, what in _broken(config, file.rules):
        raise file.refusal(rule, what)


def require_trusted(file: RuleFile, rule: Literal["authorities", "leaders"], fingerprint: str) -> None:
    """Raise `ConfigError` where the certificate with this SHA-256 is none of those that the rule names, if it names any."""
    trusted = file.rules.authorities if rule == "authorities" else file.rules.leaders
    if trusted is not None and fingerprint not in trusted:
        who = "the authority" if rule == "authorities" else "the aggregator"
        raise file.refusal(rule, f"{who} with certificate {fingerprint}")


def _broken(config: Config, rules: SiteRules) -> Iterator[tuple[str, str]]:
    if rules.tasks is not None and config.task not in rules.tasks:
        yield "tasks", f"task {config.task}"
    if rules.models is not None and config.model.architecture not in rules.models:
        yield "models", f"model.architecture {config.model.architecture}"
    if config.task != "train":
        revealed = rules.opened.diagnosis
        if revealed is not None and _REVEALED.index(config.reveal) > _REVEALED.index(revealed):
            yield "opened.diagnosis", f"a diagnosis that opens {config.reveal}"
        return
    if rules.largest_rounds is not None and config.training.rounds > rules.largest_rounds:
        yield "largest_rounds", f"training.rounds {config.training.rounds}"
    if rules.smallest_quorum is not None and config.federation.quorum_size < rules.smallest_quorum:
        yield "smallest_quorum", f"sums over {config.federation.quorum_size} hospitals"
    yield from _broken_of_privacy(config, rules.privacy)
    yield from _broken_of_opened(config, rules.opened)


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
    if not rules.patient_count and config.counts_patients:
        yield "opened.patient_count", "that the number of patients is opened"
