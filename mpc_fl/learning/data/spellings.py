"""One patient under several spellings is one patient: epsilon is promised to people, not to names. Pure.

`p01` and `P01`, letters of full width, accents in one character or two, `123` typed as `0123`. To join two patients who happen to
be called alike costs a little of what is learned; to take one for two would break what is promised.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from mpc_fl.config.columns import plain_name

_WHOLE = re.compile(r"0+(?=[0-9])([0-9]+)")


def plain_patient(patient: str) -> str:
    """What is the same for all spellings of a patient: as `plain_name`, without letters that cannot be seen and leading zeros."""
    seen = "".join(letter for letter in patient if unicodedata.category(letter) not in ("Cf", "Cc") or letter.isspace())
    plain = plain_name(seen) or patient
    number = _WHOLE.fullmatch(plain)
    return number[1] if number else plain


def in_one_spelling(patients: Sequence[str]) -> list[str]:
    """The same patients, each under the first of the spellings that come here: by the patient's own names alone."""
    spelt: dict[str, str] = {}
    for patient in sorted(set(patients)):
        spelt.setdefault(plain_patient(patient), patient)
    return [spelt[plain_patient(patient)] for patient in patients]
