"""`mpc-fl init` writes a configuration that is valid whatever was answered, and no file that was there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mpc_fl.apps.cli.beginning import init
from mpc_fl.apps.cli.training import check
from mpc_fl.apps.first_configuration import Answers, Films, first_configuration
from mpc_fl.apps.found_data import with_patients
from mpc_fl.config.columns import ColumnSection, plain_name
from mpc_fl.config.config import parse_config
from mpc_fl.config.loading import load_config
from mpc_fl.config.settings import takes_text
from mpc_fl.errors import ConfigError
from mpc_fl.learning.data.tables import read_csv
from mpc_fl.parsing import parse_yaml

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Names that differ however they are compared, and from those of label and patient.
COLUMNS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12).filter(
    plain_name
)
app = typer.Typer()
app.command()(init)

NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12)
CLASSES = NAMES.filter(lambda name: not name.startswith(".") and not set("/\\") & set(name))  # names of folders
ANSWERS = st.builds(
    Answers,
    source=st.sampled_from(["phantoms", "images", "csv"]),
    classes=st.lists(CLASSES, min_size=2, max_size=4, unique=True).map(tuple),
    hospitals=st.integers(2, 64),
    epsilon=st.floats(0.1, 50),
    smallest_hospital=st.integers(1, 10**6),
    backbone=st.sampled_from(["efficientnet_lite0", "scattering", "none"]),
    columns=st.lists(COLUMNS, min_size=1, max_size=5, unique_by=plain_name).map(tuple),
    label_column=NAMES.map("label {}".format),
    patient_column=st.none() | NAMES.map("patient {}".format),
    guesses=st.lists(
        st.builds(ColumnSection, name=COLUMNS, unit=st.none() | NAMES, missing=st.sampled_from(["error", "indicator"])),
        max_size=3,
    ).map(tuple),
    identifiers=st.lists(NAMES.filter(plain_name), max_size=3, unique_by=plain_name).map(tuple),
    films=st.none()
    | st.builds(Films, st.none() | st.sampled_from(["headers", "patients.csv"]), *(st.booleans() for _ in range(4))),
)


@given(ANSWERS)
def test_whatever_is_answered_gives_a_valid_configuration_that_says_it(answers: Answers) -> None:
    text = first_configuration(answers)
    config = parse_config(parse_yaml(text, takes_text), "x")
    assert (config.data.source, config.data.classes) == (answers.source, answers.classes)
    assert config.federation.hospitals == answers.hospitals
    assert abs(config.privacy.epsilon - answers.epsilon) <= 1e-5 * answers.epsilon
    if answers.source == "csv":
        table = config.data.table
        assert (table.label_column, table.patient_column) == (answers.label_column, answers.patient_column)
        assert tuple(column.name for column in table.columns or ()) == answers.columns
    if answers.source != "phantoms":
        assert config.privacy.smallest_hospital == answers.smallest_hospital
        assert config.privacy.delta * 4 * answers.smallest_hospital < 1
        assert config.training.batch_size <= answers.smallest_hospital


def test_what_is_written_for_x_rays_is_what_the_shipped_configuration_was_measured_with() -> None:
    shipped = load_config(CONFIGS / "chest_xray.yaml")
    smallest = shipped.privacy.smallest_hospital or 0
    written = parse_config(
        parse_yaml(first_configuration(Answers("images", smallest_hospital=smallest)), takes_text), "x"
    )
    for section in ("data", "model", "training"):
        assert getattr(written, section).model_dump(exclude={"normalise_noise_multiplier"}) == getattr(
            shipped, section
        ).model_dump(exclude={"normalise_noise_multiplier"})
    assert written.privacy.clipping_norm == shipped.privacy.clipping_norm


def test_questions_are_asked_again_until_an_answer_is_one(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    given = "images\nno, 1\n4\n1\n900\nfoo\nscattering\n"
    result = CliRunner().invoke(app, [str(path)], input=given)
    assert result.exit_code == 0, result.output
    config = load_config(path)
    assert config.data.classes == ("no", "1") and config.federation.hospitals == 4
    assert config.data.features is not None and config.data.features.extractor == "scattering"


def test_a_table_is_described_by_the_names_of_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    given = "csv\nwell, ill\n3\n8\n500\nage, leucocytes , yes\noutcome\npid\n"
    result = CliRunner().invoke(app, [str(path)], input=given)
    assert result.exit_code == 0, result.output
    table = load_config(path).data.table
    assert [column.name for column in table.columns or ()] == ["age", "leucocytes", "yes"]
    assert (table.label_column, table.patient_column) == ("outcome", "pid")
    # The examples in the comments are right.
    lines = [line.replace("# -", "-") for line in path.read_text().splitlines()]
    path.write_text("\n".join(line for line in lines if "name: age" not in line))
    columns = load_config(path).data.table.columns or ()
    assert {column.kind for column in columns} == {"number", "category", "boolean", "date"}


def test_nothing_is_asked_with_defaults_and_no_file_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    result = CliRunner().invoke(app, [str(path), "--source", "csv", "--defaults", "--hospitals", "5"])
    assert result.exit_code == 0 and load_config(path).federation.hospitals == 5
    assert "mpc-fl check" in result.output
    before = path.read_bytes()
    refused = CliRunner().invoke(app, [str(path), "--json"])
    assert "exists already" in str(refused.exception) and "--force" in str(refused.exception)
    assert path.read_bytes() == before
    again = CliRunner().invoke(app, [str(path), "--json", "--force", "--source", "phantoms"])
    assert again.exit_code == 0 and load_config(path).data.source == "phantoms"
    folder = CliRunner().invoke(app, [str(tmp_path), "--json", "--force"])
    assert "is a folder" in str(folder.exception)
    other = CliRunner().invoke(app, [str(tmp_path / "other.yaml"), "--source", "phantoms", "--json"])
    assert json.loads(other.output) == {"configuration": str(tmp_path / "other.yaml")}
    unknown = CliRunner().invoke(app, [str(tmp_path / "third.yaml"), "--source", "dicom"])
    assert "phantoms, images, csv" in str(unknown.exception) and not (tmp_path / "third.yaml").exists()


def _films(root: Path, suffix: str = "png", size: tuple[int, int] = (8, 8), name: str = "person{}_a") -> Path:
    for split in ("train", "test"):
        for number, of_class in enumerate(("no", "oedema", "Zyste: groß")):
            folder = root / split / of_class
            folder.mkdir(parents=True)
            for patient in range(3):
                Image.new("L", size, 10).save(folder / f"{name.format(100 * number + patient)}.{suffix}")
    return root


def test_a_folder_gives_its_classes_and_what_becomes_of_its_films(tmp_path: Path) -> None:
    path, root = tmp_path / "new.yaml", _films(tmp_path / "d", size=(64, 48))
    result = CliRunner().invoke(app, [str(path), "--data", str(root), "--defaults"])
    assert result.exit_code == 0 and f"mpc-fl check {path} --data {root}" in result.output, result.exception
    config, text = load_config(path), path.read_text()
    assert config.data.source == "images" and config.data.classes == ("Zyste: groß", "no", "oedema")
    assert (config.data.wrong_size, config.data.not_square) == ("resize", "pad")
    assert "whose a film is: by names of files" in text and "guessed from some films" in text
    # Of the same films at their own size nothing is to be done.
    square = _films(tmp_path / "e", size=(64, 64))
    given = "\n\n\n\nscattering\n"  # Enter keeps classes, hospitals, epsilon and patients
    result = CliRunner().invoke(app, [str(tmp_path / "asked.yaml"), "--data", str(square)], input=given)
    assert result.exit_code == 0, result.output
    asked = load_config(tmp_path / "asked.yaml")
    assert asked.data.classes == config.data.classes and asked.data.wrong_size == "error"
    as_json = CliRunner().invoke(app, [str(tmp_path / "j.yaml"), "--data", str(square), "--json"])
    found = json.loads(as_json.output)["found"]
    assert found["files"] == {"PNG": 18} and found["patients_from"] == "names of files"


def test_a_folder_that_says_of_no_film_whose_it_is(tmp_path: Path) -> None:
    path, root = tmp_path / "new.yaml", _films(tmp_path / "d", name="scan ({})")
    assert CliRunner().invoke(app, [str(path), "--data", str(root), "--defaults"]).exit_code == 0
    text = path.read_text()
    assert "NOTHING SAYS WHOSE A FILM IS" in text and load_config(path).data.unit == "patient"
    # What stands in the comments is right.
    path.write_text(text.replace("# patient_pattern", "patient_pattern"))
    assert load_config(path).data.patient_pattern == "(P[0-9]+)[ _-]"


def _clinic(path: Path, classes: str = "fm", rows: int = 40) -> Path:
    lines = [f"{row},P{row // 2},{40 + row},{classes[row % len(classes)]},{row}" for row in range(rows)]
    path.write_text("mrn,patient,age,outcome,crp (mg/l)\n" + "\n".join(lines), encoding="utf-8")
    return path


def test_a_table_gives_columns_and_their_kinds_and_a_run_can_read_it(tmp_path: Path) -> None:
    path, table = tmp_path / "new.yaml", _clinic(tmp_path / "t.csv")
    result = CliRunner().invoke(app, [str(path), "--data", str(table), "--defaults"])
    assert result.exit_code == 0, result.exception
    config, text = load_config(path), path.read_text()
    of = config.data.table
    assert config.data.classes == ("f", "m") and (of.label_column, of.patient_column) == ("outcome", "patient")
    assert [(column.name, column.unit) for column in of.columns or ()] == [("age", None), ("crp", "mg/l")]
    assert of.identifiers == ("mrn",) and "look over every line" in text and "range: [low, high]" in text
    assert len(read_csv(table, config, None).labels) == 40
    # Enter keeps what was found; another column may be none of those that are left out.
    given = "\n\n\n\nage, mrn\n\n"
    result = CliRunner().invoke(app, [str(tmp_path / "asked.yaml"), "--data", str(table)], input=given)
    assert result.exit_code == 0, result.output
    asked = load_config(tmp_path / "asked.yaml").data.table
    assert [column.name for column in asked.columns or ()] == ["age", "mrn"] and asked.identifiers == ("crp",)


def test_a_table_can_be_read_where_only_some_of_its_columns_were_chosen(tmp_path: Path) -> None:
    """Those that were left out were in no list, and a run was refused for them."""
    path, table = tmp_path / "new.yaml", _clinic(tmp_path / "t.csv")
    result = CliRunner().invoke(app, [str(path), "--data", str(table), "--defaults", "--columns", "age"])
    assert result.exit_code == 0, result.exception
    of = load_config(path).data.table
    assert [column.name for column in of.columns or ()] == ["age"] and set(of.identifiers) == {"crp", "mrn"}
    assert read_csv(table, load_config(path), None).inputs.shape == (40, 1)


QUESTIONS = {
    "phantoms": {"--source": "phantoms", "--hospitals": "3", "--epsilon": "4"},
    "images": {"--source": "images", "--classes": "a,b", "--hospitals": "3", "--epsilon": "4", "--smallest-hospital": "90",
               "--features": "scattering"},
    "csv": {"--source": "csv", "--classes": "a,b", "--hospitals": "3", "--epsilon": "4", "--smallest-hospital": "90",
            "--columns": "age, crp", "--label": "ill", "--patient": "pid"},
}  # fmt: skip


@pytest.mark.parametrize("source", QUESTIONS)
def test_every_question_has_an_option_and_is_then_not_asked(tmp_path: Path, source: str) -> None:
    path, options = tmp_path / "new.yaml", QUESTIONS[source]
    result = CliRunner().invoke(app, [str(path), *(word for pair in options.items() for word in pair)], input="")
    assert result.exit_code == 0, result.exception
    config = load_config(path)
    assert (config.data.source, config.privacy.epsilon) == (source, 4)
    assert config.privacy.smallest_hospital == (None if source == "phantoms" else 90)
    if source == "images":
        assert config.data.features is not None and config.data.features.extractor == "scattering"
    if source == "csv":
        table = config.data.table
        assert (table.label_column, table.patient_column) == ("ill", "pid")
        assert [column.name for column in table.columns or ()] == ["age", "crp"]
    for option in options:  # and without it, it is
        others = [word for pair in options.items() if pair[0] != option for word in pair]
        left = CliRunner().invoke(app, [str(tmp_path / "other.yaml"), *others], input="")
        assert isinstance(left.exception, ConfigError), option
        assert "standard input has no more answers; nothing was written" in left.exception.what
        assert "--defaults" in left.exception.fix and not (tmp_path / "other.yaml").exists()


def test_options_go_before_what_the_data_seem_to_hold(tmp_path: Path) -> None:
    path, table = tmp_path / "new.yaml", _clinic(tmp_path / "t.csv")
    given = ["--patient", "", "--smallest-hospital", "7", "--columns", "age,crp", "--label", "outcome", "--defaults"]
    assert CliRunner().invoke(app, [str(path), "--data", str(table), *given]).exit_code == 0
    config = load_config(path)
    assert (config.data.table.patient_column, config.data.unit) == (None, "image")
    assert (config.privacy.smallest_hospital, config.privacy.largest_hospital) == (7, None)
    unknown = CliRunner().invoke(app, [str(tmp_path / "x.yaml"), "--features", "vgg", "--defaults"])
    assert "knows no features 'vgg'" in str(unknown.exception) and "efficientnet_lite0" in str(unknown.exception)


@pytest.mark.parametrize(("hospitals", "rows"), [(2, 40), (3, 400), (8, 400)])
def test_what_is_written_for_a_small_table_passes_the_check_that_is_named_next(
    tmp_path: Path, hospitals: int, rows: int
) -> None:
    """It said 800 patients of a table of 40 rows, and check refused that."""
    path, table = tmp_path / "new.yaml", _clinic(tmp_path / "t.csv", rows=rows)
    result = CliRunner().invoke(app, [str(path), "--data", str(table), "--defaults", "--hospitals", str(hospitals)])
    assert result.exit_code == 0, result.exception
    check(path, data=table)  # divided over all, as it is said next
    check(path, data=table, party="hospital-0")  # all of it one hospital's
    assert "raise it where each has as many" in path.read_text()
    assert load_config(path).privacy.smallest_hospital != rows // 2 * 3 // 4  # nobody's exact number
    given = "\n\n\n7\n\n\n"  # an answer of one's own counts
    result = CliRunner().invoke(app, [str(tmp_path / "asked.yaml"), "--data", str(table)], input=given)
    assert result.exit_code == 0, result.output
    private = load_config(tmp_path / "asked.yaml").privacy
    assert (private.smallest_hospital, private.largest_hospital) == (7, None)


@given(st.integers(1, 10**6), st.integers(2, 64))
def test_public_numbers_hold_for_a_share_and_for_all(patients: int, hospitals: int) -> None:
    answers = with_patients(Answers("csv", hospitals=hospitals), patients)
    assert 1 <= answers.smallest_hospital <= max(1, patients // hospitals)
    assert patients <= (answers.largest_hospital or 4 * answers.smallest_hospital)
    assert answers.largest_hospital is None or answers.largest_hospital <= max(2 * patients, 2)
    text = first_configuration(answers)
    private = parse_config(parse_yaml(text, takes_text), "x").privacy
    assert (private.smallest_hospital, private.largest_hospital) == (
        answers.smallest_hospital,
        answers.largest_hospital,
    )
    assert private.delta < 1 / patients


def test_what_data_do_not_say_is_asked_for_in_one_line(tmp_path: Path) -> None:
    path, one = tmp_path / "new.yaml", _clinic(tmp_path / "one.csv", classes="f")

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(path), "--defaults", *arguments])
        assert result.exit_code and not path.exists()
        return str(result.exception)

    assert "fewer than two classes" in refused("--data", str(one)) and "--classes" in refused("--data", str(one))
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    assert "say which it is with --label" in refused("--data", str(tmp_path / "none.csv"))
    assert "looked at as csv, not as phantoms" in refused("--data", str(one), "--source", "phantoms")
    assert "does not exist" in refused("--data", str(tmp_path / "absent"))
    (tmp_path / "a.npz").write_bytes(b"")
    assert "does not look into .npz" in refused("--data", str(tmp_path / "a.npz"))
    said = CliRunner().invoke(app, [str(path), "--defaults", "--data", str(one), "--classes", "f, m"])
    assert said.exit_code == 0 and load_config(path).data.classes == ("f", "m")


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf"])
def test_an_epsilon_that_cannot_be_is_refused_in_one_line(tmp_path: Path, epsilon: str) -> None:
    arguments = [str(tmp_path / "new.yaml"), "--source", "images", "--epsilon", epsilon, "--defaults"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError) and "privacy.epsilon" in refused.exception.what
    assert not (tmp_path / "new.yaml").exists()
