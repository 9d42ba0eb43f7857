"""Tables with agreed columns: written at random as sites write them and read back, and every mistake is one line that names it."""

from __future__ import annotations

import csv
import datetime
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpc_fl.config.columns import plain_name
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.learning.data.survey import survey
from mpc_fl.learning.data.tables import Records, read_csv

LETTERS = "abcxyzäöüéßøN "
# The first letter is of ASCII, so that UTF-16 can be told without a mark; none of these names means an identifier.
NAMES = st.text(LETTERS, max_size=6).map(lambda rest: f"c{' '.join(rest.split())}")
ENCODINGS = {
    "utf-8": (b"", "utf-8"),
    "utf-8 with a mark": (b"\xef\xbb\xbf", "utf-8"),
    "utf-16-le with a mark": (b"\xff\xfe", "utf-16-le"),
    "utf-16-be with a mark": (b"\xfe\xff", "utf-16-be"),
    "utf-16-le": (b"", "utf-16-le"),
    "utf-16-be": (b"", "utf-16-be"),
    "cp1252": (b"", "cp1252"),
    "latin-1": (b"", "latin-1"),
}
MISSING = ("", "NA", "n/a", "NaN", "-", "#N/A")
TRUTHS = {"yes": 1.0, "TRUE": 1.0, "1": 1.0, "Wahr": 1.0, "n": -1.0, "False": -1.0, "0.0": -1.0, "nein": -1.0}


def config_of(columns: list[dict[str, Any]] | None, **table: Any) -> Config:
    return parse_config(
        {
            "data": {
                "source": "csv",
                "classes": ["benign", "malignant"],
                "table": {"columns": columns, "patient_column": "who", "test_fraction": 1e-9, **table},
            }
        },
        "test",
    )


@st.composite
def columns(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique_by=plain_name)):
        kind = draw(st.sampled_from(["number", "category", "boolean", "date"]))
        column: dict[str, Any] = {"name": name, "kind": kind}
        column["missing"] = draw(st.sampled_from(["error", "leave_out", "indicator", "fill"]))
        if kind == "category":
            column["categories"] = draw(st.lists(NAMES, min_size=2, max_size=4, unique_by=plain_name))
        if kind == "date":
            column |= {"since": "2000-02-29"}
            column["order"] = draw(st.sampled_from(["year_month_day", "day_month_year", "month_day_year"]))
        if kind == "number":
            column["censored"] = draw(st.sampled_from(["error", "limit", "half"]))
            column["unit"] = draw(st.sampled_from([None, "mg/l", "µmol/L"]))
        if kind in ("number", "date"):
            column["range"] = draw(st.sampled_from([None, (-5.0, 20.5)]))
        if column["missing"] == "fill":
            fills = {"number": "3.25", "boolean": "yes", "date": "2001-02-28"}
            column["fill"] = fills.get(kind) or column["categories"][-1]
        made.append(column)
    return made


@dataclass(frozen=True)
class Cell:
    """As a site writes it, with a decimal point, and the features that it should become; None for a row to leave out."""

    text: str
    features: list[float] | None


def scaled(value: float, column: dict[str, Any]) -> float:
    if column["range"] is None:
        return math.copysign(math.log(1 + abs(value)), value)
    low, high = column["range"]
    return float(4 * math.sqrt(min(1, max(0, (value - low) / (high - low)))) - 2)


def years(date: datetime.date) -> float:
    return (date - datetime.date(2000, 2, 29)).days / 365.25


@st.composite
def cells(draw: st.DrawFn, column: dict[str, Any]) -> Cell:
    kind, missing = column["kind"], column["missing"]
    marked = [0.0] if missing == "indicator" else []
    if missing != "error" and draw(st.integers(0, 4)) == 0:
        text = draw(st.sampled_from(MISSING))
        if missing == "leave_out":
            return Cell(text, None)
        if missing == "indicator":
            return Cell(text, [0.0] * len(column.get("categories") or [0]) + [1.0])
        filled = {"boolean": [1.0]}
        if kind == "category":
            filled["category"] = [0.0] * (len(column["categories"]) - 1) + [1.0]
        if kind == "number":
            filled["number"] = [scaled(3.25, column)]
        if kind == "date":
            filled["date"] = [scaled(years(datetime.date(2001, 2, 28)), column)]
        return Cell(text, filled[kind])
    if kind == "category":
        place = draw(st.integers(0, len(column["categories"]) - 1))
        return Cell(column["categories"][place], [float(place == n) for n in range(len(column["categories"]))] + marked)
    if kind == "boolean":
        word = draw(st.sampled_from(list(TRUTHS)))
        return Cell(word, [TRUTHS[word], *marked])
    if kind == "date":
        date = draw(st.dates(datetime.date(1900, 1, 1), datetime.date(2100, 1, 1)))
        last = {"day_month_year": date.strftime("%d.%m.%Y"), "month_day_year": f"{date.month}/{date.day}/{date.year}"}
        text = draw(st.sampled_from([date.isoformat(), last.get(column["order"], f"{date:%Y%m%d}")]))
        time = draw(st.sampled_from(["", " 00:00:00"]))
        return Cell(text + time, [scaled(years(date), column), *marked])
    digits = draw(st.sampled_from([0, 1, 2]))
    value = draw(st.integers(-3000, 3000)) / 10**digits
    limit = draw(st.sampled_from(["", "<", "> "])) if column["censored"] != "error" else ""
    means = value / 2 if limit == "<" and column["censored"] == "half" else value
    return Cell(f"{limit}{value:.{digits}f}", [scaled(means, column), *marked])


@dataclass(frozen=True)
class Written:
    """A table as a site wrote it, and what should be read."""

    columns: list[dict[str, Any]]
    content: bytes
    delimiter: str
    encoding: str
    features: list[list[float]]
    labels: list[int]
    left_out: int


@st.composite
def tables(draw: st.DrawFn) -> Written:
    made = draw(columns())
    header = [column["name"] for column in made]
    for place, column in enumerate(made):
        if column.get("unit") and draw(st.booleans()):
            header[place] += draw(st.sampled_from([f" [{column['unit']}]", f"({column['unit']})"]))
        elif draw(st.booleans()):
            header[place] = header[place].upper()
    header += ["label", "who", "mrn"]
    comma = draw(st.booleans())
    rows, features, labels = [], [], []
    for number in range(draw(st.integers(1, 8))):
        drawn = [draw(cells(column)) for column in made]
        texts = [
            cell.text.replace(".", ",") if comma and column["kind"] == "number" and cell.features else cell.text
            for cell, column in zip(drawn, made, strict=True)
        ]
        label, word = draw(st.sampled_from([(0, "benign"), (1, "Malignant"), (1, "1"), (0, "0.0"), (1, "True")]))
        rows.append([*texts, word, f"p{number}", str(7000 + number)])
        if all(cell.features is not None for cell in drawn):
            features.append([value for cell in drawn for value in cell.features or ()])
            labels.append(label)
    order = draw(st.permutations(range(len(header))))
    file, delimiter = io.StringIO(newline=""), draw(st.sampled_from(",;\t"))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([line[place] for place in order] for line in [header, *rows])
    encoding = draw(st.sampled_from(list(ENCODINGS)))
    mark, codec = ENCODINGS[encoding]
    content = mark + file.getvalue().encode(codec)
    return Written(made, content, delimiter, encoding, features, labels, len(rows) - len(features))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tables())
def test_a_table_comes_out_alike_however_a_site_writes_it(tmp_path: Path, written: Written) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(written.content)
    config = config_of(written.columns, identifiers=["mrn"])
    if not written.features:
        with pytest.raises(DataError, match="no row has a value"):
            read_csv(path, config, "train")
        return
    records = read_csv(path, config, "train")
    assert records.inputs.dtype == np.float32
    assert records.inputs.shape == (len(written.features), *config.data.input_shape)
    np.testing.assert_allclose(records.inputs, np.array(written.features), rtol=1e-5, atol=1e-6)
    assert records.labels.tolist() == written.labels
    low = 2.0 if config.data.table.bounded else 710.0
    assert np.abs(records.inputs).max() <= low
    said = records.treatments[0][0]
    assert {",": "comma", ";": "semicolon", "\t": "tab"}[written.delimiter] in said
    codec = ENCODINGS[written.encoding][1]
    names = [codec] if not written.content.isascii() or "utf-16" in codec else ["utf-8"]
    assert any(name.replace("latin-1", "cp1252").upper() in said for name in names)
    if written.left_out:
        with pytest.raises(DataError, match="has no value"):  # nobody's question is dropped
            read_csv(path, config, None)
    else:
        assert len(read_csv(path, config, None).labels) == len(written.features)


def read(tmp_path: Path, content: str | bytes, config: Config) -> Records:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_csv(path, config, "train")


AGE_AND_CRP = [{"name": "age"}, {"name": "CRP", "unit": "mg/l", "range": [0, 500], "censored": "half"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("who,age,label\na,1,0\n", "lacks 'CRP': rename columns as agreed"),
        ("who,age,crp,bmi,label\na,1,2,3,0\n", "has 'bmi', which data.table.columns does not name: leave them out"),
        ("who,age,bmi,label\na,1,2,0\n", "lacks 'CRP' and has 'bmi', which"),
        ("who,age,crp [mg/dl],label\na,1,2,0\n", "column 'CRP' in 'mg/dl', agreed is 'mg/l'"),
        ("who,age [years],crp,label\na,1,2,0\n", r"lacks 'age' and has 'age \[years\]'"),
        ("who,age,crp,crp [mg/l],label\na,1,2,2,0\n", "has the column 'CRP' twice"),
        ("who,age,Crp,crp,label\na,1,2,2,0\n", "two columns of the same name"),
        ("who,age,,label,crp\na,1,2,0,3\n", "a column without a name, number 3"),
        (",who,age,crp,label\n1,a,1,2,0\n0,b,1,2,0\n", "a column without a name, number 1"),
        ("who,age,crp,label\na,,2,0\n", "line 2: column 'age' has no value"),
        ("who,age,crp,label\na,<5,2,0\n", "line 2: column 'age' holds a limit; say with `censored`"),
        ("who,age,crp,label\na,GEHEIM,2,0\n", "line 2: column 'age' holds no number"),
        ("who;age;crp;label\na;1;2,5;0\nb;1;2.5;0\n", r"decimal point \(line 3\) and with a comma \(line 2\)"),
        ('who,age,crp,label\na,1,"1,234",0\n', "line 2: ',' comes before three digits in all numbers"),
        ("who;age;crp;label\na;1;1.234;0\n", "line 2: '.' comes before three digits in all numbers"),
        ('who,age,crp,label\na,1,"1,234.5",0\n', "column 'CRP' holds no number"),
        ('who,age,crp,label\na,1,"2,0\n', "line 2: quotes do not match"),
        (b"PK\x03\x04 a workbook", "it is a spreadsheet: save it as CSV"),
        (b"\xd0\xcf\x11\xe0 a workbook", "it is a spreadsheet: save it as CSV"),
        ("who,age,crp,label\na,1,2,Maybe\n", "line 2 has a label that is neither a class"),
        ("who,age,crp,label\na,1,2,2.0\n", "wrong number of classes: .* line 2 has a label outside of the 2"),
    ],
)
def test_mistakes_in_tables_with_agreed_columns(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content, config_of(AGE_AND_CRP))
    assert "\n" not in str(caught.value) and "GEHEIM" not in str(caught.value) and caught.value.fix
    assert caught.value.for_peers == "its data cannot be used"


def test_what_is_never_read_need_not_name_the_unit_of_its_header(tmp_path: Path) -> None:
    config = config_of([{"name": "age"}], identifiers=["crp"])
    for header in ("crp", "crp [mg/l]", "CRP (mg/l)"):
        assert read(tmp_path, f"who,{header},age,label\na,1,40,0\nb,2,50,1\n", config).inputs.shape[1] == 1
    with pytest.raises(DataError, match=r"has 'bmi \[kg\]'"):
        read(tmp_path, "who,bmi [kg],age,label\na,1,40,0\nb,2,50,1\n", config)


def test_three_digits_after_the_mark_are_decimals_where_another_number_says_so(tmp_path: Path) -> None:
    config = config_of([{"name": "crp", "range": [0, 500]}])
    point = read(tmp_path, "who,crp,label\na,1.234,0\nb,0.5,1\n", config).inputs
    for content in (
        "who;crp;label\na;1,234;0\nb;,5;1\n",  # as semicolons say too
        'who,crp,label\na,"1,234",0\nb,"0,5",1\n',
        "who\tcrp\tlabel\na\t1.234\t0\nb\t5E-1\t1\n",
        "who;crp;label\na;1.234;0\nb;0.500;1\n",
    ):
        np.testing.assert_array_equal(read(tmp_path, content, config).inputs, point)


def test_what_spreadsheets_leave_beside_a_table_is_no_part_of_it(tmp_path: Path) -> None:
    content = "sep=;\r\nwho;age;crp;label;;\r\na;1;2;0;;\r\n;;;;;\r\nb;3;4;1;;\r\n"
    records = read(tmp_path, content, config_of(AGE_AND_CRP))
    assert records.names == ["t.csv line 3", "t.csv line 5"] and records.patients == ["a", "b"]


@pytest.mark.parametrize(
    ("unit", "same"), [("\u03bcg/L", True), ("\u00b5g / l", True), ("mg/l", False), ("\u039cg/l", False)]
)
def test_units_in_headers_are_compared_with_the_agreed_ones(tmp_path: Path, unit: str, same: bool) -> None:
    """The micro sign and the Greek letter are one, and so are the two ways to write a litre; lower and upper case are not."""
    config = config_of([{"name": "ferritin", "unit": "\u00b5g/l"}])
    content = f"who,Ferritin ({unit}),label\na,1.5,0\n"
    if same:
        assert read(tmp_path, content, config).labels.tolist() == [0]
    else:
        with pytest.raises(DataError, match="agreed is"):
            read(tmp_path, content, config)


@pytest.mark.parametrize("name", ["id", "MRN", "Patient ID", "pat_id", "case no.", "Unnamed: 0", "Last Name", "nr"])
@pytest.mark.parametrize("text", [False, True])
def test_what_looks_like_an_identifier_is_refused_until_it_is_named_one(tmp_path: Path, name: str, text: bool) -> None:
    lines = [f"{row},{row % 7},{row % 2},p{row // 2},{'x' * text}{1000 + row // 2}\n" for row in range(20)]
    content = f"crp,age,label,who,{name}\n" + "".join(lines)
    columns = [{"name": "crp"}, {"name": "age"}]
    for config in [config_of(None, features=3), config_of([*columns, {"name": name}])]:
        with pytest.raises(DataError, match="looks like an identifier.*data.table.identifiers"):
            read(tmp_path, content, config)
    left_out = config_of(None, features=2, identifiers=[name, "elsewhere"])
    found = read(tmp_path, content, left_out)
    np.testing.assert_array_equal(found.inputs, read(tmp_path, content, config_of(columns, identifiers=[name])).inputs)
    # A column of that name whose values patients share is none.
    lines = [f"{row},{row % 7},{row % 2},p{row},{row % 3}\n" for row in range(20)]
    shared = f"crp,age,label,who,{name}\n" + "".join(lines)
    assert read(tmp_path, shared, config_of([*columns, {"name": name}])).inputs.shape == (20, 3)


def test_classes_that_are_numbers_are_names_and_never_places(tmp_path: Path) -> None:
    config = config_of([{"name": "age"}]).with_values(data={"classes": ["1", "2"]})
    content = "who,age,label\na,1,1.0\nb,1,2\n"
    assert read(tmp_path, content, config).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="a number that is no class"):
        read(tmp_path, content + "c,1,0\n", config)
    both = config.with_values(data={"classes": ["Ill", "ill", "WELL"]})
    assert read(tmp_path, "who,age,label\na,1,ill\nb,1,Well\n", both).labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="fits several classes"):
        read(tmp_path, "who,age,label\na,1,ILL\n", both)


@pytest.mark.parametrize("written", ["{}", "{}.0", "{},0"])
def test_an_identifier_with_gaps_is_one(tmp_path: Path, written: str) -> None:
    """Of a column with an empty cell spreadsheets write 4711.0, and where nobody says whose rows are some have the same."""
    numbers = [4000 + row // 2 * 7 if row < 20 else 5000 + row for row in range(60)]
    rows = [f"p{row};{written.format(number)};{row};{row % 2}\n" for row, number in enumerate(numbers)]
    columns = [{"name": "mrn", "missing": "indicator"}, {"name": "age"}]
    with pytest.raises(DataError, match="looks like an identifier"):
        read(tmp_path, "who;mrn;age;label\n" + "".join(rows) + "p60;;3;1\n", config_of(columns))
    visits = "who;visit no.;age;label\n" + "".join(f"p{row};{row % 3};{row};{row % 2}\n" for row in range(60))
    found = read(tmp_path, visits, config_of([{"name": "visit no."}, {"name": "age"}]))
    assert found.inputs.shape == (60, 2)  # of which there are few


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"name": " "}, "short name"),
        ({"name": "a\x1b[2J"}, "short name"),
        ({"name": "a", "range": [2, 2]}, "low < high"),
        ({"name": "a", "missing": "fill"}, "go together"),
        ({"name": "a", "fill": "1"}, "go together"),
        ({"name": "a", "missing": "fill", "fill": "1_0"}, "no value of a number"),
        ({"name": "a", "missing": "fill", "fill": "1e999"}, "no value of a number"),
        ({"name": "a", "kind": "boolean", "missing": "fill", "fill": "x"}, "no value of a boolean"),
        ({"name": "a", "kind": "date", "since": "2020-01-01", "missing": "fill", "fill": "1.1.2020"}, "of a date"),
        ({"name": "a", "kind": "category", "categories": ["f", "m"], "missing": "fill", "fill": "x"}, "of a category"),
        ({"name": "a", "kind": "category", "categories": ["f"]}, "at least two categories"),
        ({"name": "a", "kind": "category", "categories": ["f", "F"]}, "that differ"),
        ({"name": "a", "categories": ["f", "m"]}, "other kinds have none"),
        ({"name": "a", "kind": "date"}, "needs `since`"),
        ({"name": "a", "kind": "date", "since": "2020-02-30"}, "written as 2020-12-31"),
        ({"name": "a", "since": "2020-01-01"}, "needs `since`"),
        ({"name": "a", "order": "day_month_year"}, "order is that of a date"),
        ({"name": "a", "kind": "boolean", "range": [0, 1]}, "range is that of"),
        ({"name": "a", "kind": "boolean", "censored": "half"}, "those of a number"),
        ({"name": "a", "kind": "boolean", "unit": "m"}, "those of a number"),
        ({"name": "who"}, "names the column 'who' twice"),
        ({"name": "LABEL"}, "names the column 'LABEL' twice"),
        ({"name": "a", "knd": "number"}, r"unknown key 'data.table.columns.0.knd'.*columns.0.kind"),
    ],
)
def test_columns_that_cannot_be_or_have_no_effect_are_refused(column: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of([column])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "csv"}, "csv needs table.columns"),
        ({"source": "csv", "table": {"columns": []}}, "at least one column"),
        ({"source": "csv", "table": {"columns": [{"name": "a"}], "features": 1}}, "leave features"),
        ({"source": "csv", "table": {"columns": [{"name": "a"}], "reference_ranges": [[0, 1]]}}, "leave features"),
        ({"source": "csv", "table": {"columns": [{"name": "a"}], "identifiers": ["A"]}}, "'a' twice|'A' twice"),
        ({"source": "csv", "table": {"features": 1}, "partition": {"method": "none"}}, "agree on data.table.columns"),
        ({"source": "csv", "table": {"columns": [{"name": "a"}]}, "normalise": "secure"}, "public bounds"),
        ({"source": "npz", "table": {"identifiers": ["a"]}}, "are those of csv"),
        ({"source": "phantoms", "table": {"columns": [{"name": "a"}]}}, "are those of csv"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"data": {"classes": ["a", "b"], **data}}, "test")


def test_every_agreed_fact_about_a_column_is_compared_at_the_hand_shake() -> None:
    first = config_of(AGE_AND_CRP)
    others = [
        AGE_AND_CRP[::-1],
        [AGE_AND_CRP[0], {**AGE_AND_CRP[1], "unit": "mg/dl"}],
        [AGE_AND_CRP[0], {**AGE_AND_CRP[1], "censored": "limit"}],
        [AGE_AND_CRP[0], {**AGE_AND_CRP[1], "range": [0, 400]}],
    ]
    digests = {config_of(other).digest() for other in others}
    assert len(digests) == 4 and first.digest() not in digests
    assert parse_config(first.model_dump(mode="json"), "again") == first


def test_check_says_how_a_table_is_read_and_what_looks_wrong(tmp_path: Path) -> None:
    columns = [
        {"name": "crp", "unit": "mg/l", "range": [0, 500], "missing": "leave_out"},
        {"name": "sex", "kind": "category", "categories": ["f", "m"], "missing": "indicator"},
    ]
    path = tmp_path / "t.csv"
    lines = [f"p{row};{row % 2};{'' if row % 10 == 3 else row * 30},5;{'fm'[row % 2]}\n" for row in range(60)]
    path.write_text("who;label;crp;sex\n" + "".join(lines).replace(";,5;", ";NA;").replace("30,5;f", "30,5;"))
    config = config_of(columns, test_fraction=0.3).with_values(site={"data": str(path)})
    found = survey(config)
    missing = sum(row % 10 == 3 for row in range(60))
    assert found.records == 60 - missing and found.left_aside == {"rows without 'crp'": missing}
    treatments = found.treatments
    outside = sum(row * 30 + 0.5 > 500 for row in range(60) if row % 10 != 3)
    assert treatments["read as UTF-8, parted by semicolon, with decimal commas"] == 54
    assert treatments["'crp' outside of its range, cut off"] == outside
    assert found.warnings == [f"{outside} of 54 values of 'crp' lie outside of its range: see whether they are in mg/l"]
