"""JSON and YAML: a value that a program can go on with, or `ValueError`, whatever the text is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.parsing import DEEPEST, parse_json, parse_json_lines, parse_yaml

REFUSED_JSON = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep and closed": ("[" * 200 + "]" * 200, "nested too deeply"),
    "deep objects": ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
    "infinity": ("Infinity", "NaN or an infinity"),
    "NaN within": ('{"a": [1, NaN]}', "NaN or an infinity"),
    "beyond floats": ("[1e999]", "beyond all numbers"),
    "many digits": ("9" * 5000, "too many digits"),
    "more digits than a float": ("1" * 400, "too many digits"),
    "twice": ('{"a": 1, "a": 2}', "a key comes twice"),
    "empty": ("", "not JSON"),
    "half": ('{"a": ', "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a mark": (b"\xef\xbb\xbf{}", "not JSON"),
}


@pytest.mark.parametrize("name", list(REFUSED_JSON))
def test_json_that_no_program_can_go_on_with_is_refused(name: str) -> None:
    text, words = REFUSED_JSON[name]
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_lines_are_named_and_one_that_a_crash_cut_off_is_none() -> None:
    assert parse_json_lines('{"a": 1}\n\n[2]\n{"a": ') == [{"a": 1}, [2]]
    assert parse_json_lines(b"") == []
    with pytest.raises(ValueError, match="line 2: not JSON"):
        parse_json_lines(b"1\n{\n3\n")
    separated = json.dumps("a\u2028b", ensure_ascii=False)  # a character that `splitlines` would take for an end
    assert parse_json_lines(separated + "\n") == ["a\u2028b"]


def plain(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        values, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=8), parts, max_size=4)
    )


FINITE = st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False, allow_infinity=False)


@given(plain(FINITE | st.text()))
def test_what_was_written_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@given(plain(FINITE | st.text(st.characters(min_codepoint=32, max_codepoint=126))))
def test_yaml_that_was_written_is_read(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


REFUSED_YAML = {
    "deep": ("[" * 10_000, "nested too deeply"),
    "deeper than it may be": ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested too deeply"),
    "a list in itself": ("a: &a [*a]", "refers to itself"),
    "a mapping in itself": ("a: &a {b: *a}", "refers to itself"),
    "a billion laughs": (laughs(9), "comes too often"),
    "twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' comes twice"),
    "twice, hostile": ('a:\n  "\\e[2J\\u202e": 1\n  "\\e[2J\\u202e": 2\n', r"line 3: the key '\?\[2J\?' comes twice"),
    "twice, long": (f"{'k' * 100}: 1\n{'k' * 100}: 2\n", f"line 2: the key '{'k' * 60}' comes twice"),
    "a number for a key": ("1: 2", "a key is no text"),
    "a list for a key": ("? [a, b]\n: 2", "a key is no text"),
    "many digits": ("a: " + "9" * 5000, "too many digits"),
    "many hexadecimal digits": ("a: 0x" + "f" * 50_000, "too many digits"),
    "no such day": ("a: 2001-99-99", "a value is not of its kind"),
    "no number": ("a: !!int foo", "a value is not of its kind"),
    "no float": ("a: !!float foo", "a value is not of its kind"),
    "no time": ("a: !!timestamp foo", "a value is not of its kind"),
    "an object": ("a: !!python/object:os.system {}", "line 1: not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: not valid YAML"),
    "an alias of nothing": ("a: *b", "line 1: not valid YAML"),
    "control characters": ("a: \x00", "not valid YAML"),
    "open": ("a: {b: 1\n", "line 2: not valid YAML"),
}


@pytest.mark.parametrize("name", list(REFUSED_YAML))
def test_yaml_that_no_program_can_go_on_with_is_refused(name: str) -> None:
    """On the old code these ended in a traceback, ran for ever, or were taken for the last of two values."""
    text, words = REFUSED_YAML[name]
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_aliases_and_merges_are_read_as_ever() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nsame: *base\n"
    assert parse_yaml(text) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "same": {"a": 1, "b": 2}}
    assert parse_yaml("") is None and math.isinf(parse_yaml(".inf"))


@given(st.binary(max_size=60) | st.text(alphabet="[]{}&*a:- \n\t!<>|'\"#%,.0123e+\\u~", max_size=60))
def test_anything_at_all_is_a_value_or_refused(content: bytes | str) -> None:
    for read in (parse_json, parse_json_lines, parse_yaml):
        text = content.decode("latin-1") if isinstance(content, bytes) and read is parse_yaml else content
        try:
            value = read(text)  # type: ignore[arg-type]
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            json.dumps(value, default=str)
