"""Names that sites choose for themselves (`charite`, `st-thomas`): what such a name may be, and how people are shown it.

A party's identity (`roles`: a role, and a hospital's rank) is what protocols, transcripts and files know. A chosen name is an
attribute of it: the configuration gives it (`federation.names`), the party's certificate binds it (`crypto.certificates`), and
it enters a text only where people read it: errors, logs, progress, reports. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from mpc_fl.errors import IdentityError, MpcFlError
from mpc_fl.roles import AGGREGATOR, DEALER, HOSPITAL_ROLE, MODEL_OWNER, check_party_name, is_hospital

LONGEST_CHOSEN_NAME = 40
_CHOSEN = re.compile(rf"[a-z0-9](?:[a-z0-9-]{{0,{LONGEST_CHOSEN_NAME - 2}}}[a-z0-9])?")
_FIX = f"choose 1 to {LONGEST_CHOSEN_NAME} letters a to z, digits and hyphens, like st-thomas"


def _outline(name: str) -> str:
    """What is left of a name for a quick eye: without hyphens, and letters that look alike as one."""
    return name.replace("-", "").replace("rn", "m").replace("vv", "w").translate(str.maketrans("01i5", "olls"))


_SERVERS = frozenset(map(_outline, (AGGREGATOR, DEALER, MODEL_OWNER)))
_HOSPITALS = re.compile(rf"{_outline(HOSPITAL_ROLE)}[ols2-9]*")  # the digits of a rank, as `_outline` leaves them


def check_chosen_name(name: str) -> str:
    """The same name. Raises `IdentityError` when no site may choose it: of another form, or like the identity of a party."""
    if _CHOSEN.fullmatch(name) is None:
        raise IdentityError(f"'{name[:LONGEST_CHOSEN_NAME]}' cannot be the name of a site", _FIX)
    if _outline(name) in _SERVERS or _HOSPITALS.fullmatch(_outline(name)):
        raise IdentityError(f"'{name}' reads like the identity of a party, not like a name", "choose another name")
    return name


def look_alike(one: str, other: str) -> bool:
    """Whether a quick eye takes one chosen name for the other: st-thomas, stthomas and st-th0mas do."""
    return _outline(one) == _outline(other)


@dataclass(frozen=True)
class ChosenNames:
    """The names of some parties of a federation, as (identity, name) in order of identity; the others have none."""

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, names: Mapping[str, str]) -> ChosenNames:
        """From a name by identity. Raises `IdentityError` for a name no site may choose, and for two that look alike."""
        seen: dict[str, str] = {}
        for party, name in names.items():
            other = seen.setdefault(_outline(check_chosen_name(name)), party)
            if other != party:
                raise IdentityError(
                    f"{other} and {party} have names that look alike: '{names[other]}' and '{name}'",
                    "give each party a name of its own",
                )
        return cls(tuple(sorted(names.items())))

    @classmethod
    def readable(cls, names: Mapping[str, str] | None) -> ChosenNames:
        """From a file that nobody vouches for: what is no name of a party is left out."""
        found: dict[str, str] = {}
        for party, name in (names or {}).items():
            try:
                found = dict(cls.of({**found, check_party_name(party): name}).pairs)
            except IdentityError:
                continue
        return cls.of(found)

    def get(self, party: str) -> str | None:
        """The name that a party has, None where it has none."""
        return dict(self.pairs).get(party)

    def called(self, name: str) -> str | None:
        """The party that has exactly this name, None where nobody has."""
        return next((party for party, own in self.pairs if own == name), None)

    def holder(self, name: str) -> str | None:
        """The party that has this name, or one that looks like it."""
        return next((party for party, own in self.pairs if look_alike(own, name)), None)

    def short(self, party: str) -> str:
        """The name of a party where there is little room (a figure): its identity where it has none."""
        return self.get(party) or party

    def shown(self, party: str) -> str:
        """A party as people are told of it: 'charite (hospital-0)'; its identity alone where it has no name."""
        name = self.get(party)
        return party if name is None else f"{name} ({party})"

    def in_text(self, text: str) -> str:
        """A text for people with every party as `shown`; paths and names of settings stay, and so does what was shown already.

        The identity of a server is a word too: after an article ("the aggregator"), or as the value of a setting, it is one.
        """
        return _pattern(self).sub(lambda found: self.shown(found[0]), text) if self.pairs else text


NO_NAMES = ChosenNames()


@lru_cache(maxsize=16)
def _pattern(names: ChosenNames) -> re.Pattern[str]:
    """Finds identities that stand by themselves: in no path, file name or dotted setting, and not behind their own name."""

    def one(party: str, name: str) -> str:
        word = "" if is_hospital(party) else r"(?<!\bthe )(?<!\ban )(?<!\ba )(?<!coordinator to )(?<!coordinator: )"
        return rf"(?<!{re.escape(name)} \(){word}{re.escape(party)}"

    either = "|".join(one(party, name) for party, name in names.pairs)
    return re.compile(rf"(?<![\w./-])(?:{either})(?![\w/-])(?!\.\w)")


@contextmanager
def told_by_name(names: ChosenNames) -> Iterator[None]:
    """Within, an error that is raised for the user tells of parties by their names."""
    try:
        yield
    except MpcFlError as error:
        error.reword(names.in_text)
        raise
