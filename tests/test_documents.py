"""What the documents name exists: links, paths, functions, commands, settings. And the README stays short."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from pydantic import BaseModel
from typer.testing import CliRunner

from mpc_fl.apps.cli import config as config_commands
from mpc_fl.apps.cli.commands import app
from mpc_fl.config.columns import ColumnSection
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.data import DataSection, TableSection
from mpc_fl.config.mistakes import section_of
from mpc_fl.config.settings import takes_text
from mpc_fl.learning.data import windows
from mpc_fl.learning.data.patients import PatientRow
from mpc_fl.learning.data.tables import Part
from mpc_fl.parsing import parse_yaml

REPOSITORY = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
DOCUMENTS = sorted([*(REPOSITORY / name for name in TOP), *(REPOSITORY / "docs").rglob("*.md")])
EXAMPLES = sorted([*(REPOSITORY / "examples").iterdir(), *(REPOSITORY / "configs").iterdir()])
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path from the root of the repository, perhaps with a name that the file defines: mpc_fl/sharing/opening.py:open_to
NAMED = re.compile(
    r"(?<![\w/.-])((?:mpc_fl|parties|tests|benchmarks|examples|configs|docs)/[\w./-]*\w|(?:mpc_fl|parties)/)(?::([A-Za-z_][\w.]*))?"
)
CODE = re.compile(r"```.*?```|`[^`\n]+`|^ {4}\S.*$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?<![\w./-])mpc-fl ((?:[a-z]+\b ?){1,2})")
SETTING = re.compile(r"--set[ =]([a-z_]+(?:\.[a-z_]+)+)=|`([a-z_]+(?:\.[a-z_]+)+)(?:[=:][^`\n]*)?`")
FILES = (".safetensors", ".yaml", ".crt", ".crl", ".html", ".jsonl", ".py", ".md")
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)

by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as the hosting site makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def definitions(source: Path) -> set[str]:
    """What a module defines: functions, classes, methods as Class.method, assigned names."""
    names = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@by_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(REPOSITORY) and target.exists(), link
        assert not anchor or anchor in headings(target), link


@by_document
def test_paths_and_what_they_define_exist(document: Path) -> None:
    for path, name in NAMED.findall(document.read_text()):
        if "<" in path:
            continue
        assert (REPOSITORY / path).exists(), path
        assert not name or name in definitions(REPOSITORY / path), f"{path}:{name}"


@by_document
def test_commands_exist(document: Path) -> None:
    root = typer.main.get_command(app)
    for code in CODE.findall(document.read_text()):
        for words in COMMAND.findall(code):
            command, context = root, None
            for word in words.split():
                if not hasattr(command, "resolve_command"):
                    break  # what follows a command are its arguments
                context = typer.Context(command, parent=context)
                _, command, _ = command.resolve_command(context, [word])  # an error of usage when there is none


@pytest.mark.parametrize("document", [*DOCUMENTS, *EXAMPLES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_settings_exist(document: Path) -> None:
    if not document.is_file():
        return
    for override, mentioned in SETTING.findall(document.read_text()):
        section: type[BaseModel] = Config
        setting = override or mentioned
        *sections, last = setting.split(".")
        if mentioned and (setting.endswith(FILES) or sections[0] not in Config.model_fields):
            continue  # a file, or an attribute of something else
        for name in sections:
            within = section_of(section, name)
            assert within is not None, setting
            section = within
        assert last in section.model_fields, setting


@by_document
def test_pictures_are_of_a_known_kind_and_all_participants_are_declared(document: Path) -> None:
    for picture in MERMAID.findall(document.read_text()):
        assert ";" not in picture, "a semicolon ends a statement there"
        kind, *lines = [line.strip() for line in picture.strip().splitlines()]
        assert kind in ("sequenceDiagram", "flowchart TD"), kind
        if kind == "sequenceDiagram":
            declared = {line.split()[1] for line in lines if line.startswith("participant ")}
            for line in lines:
                arrow = re.match(r"(\w+)->>(\w+): \S", line)
                assert arrow or re.match(r"(participant|Note over|loop|alt|else|opt|end)\b", line), line
                assert arrow is None or set(arrow.groups()) <= declared, line


def test_every_package_and_protocol_page_is_described() -> None:
    architecture = (REPOSITORY / "docs/architecture.md").read_text()
    packages = [path.parent.name for path in (REPOSITORY / "mpc_fl").glob("*/__init__.py")]
    assert len(packages) == 12
    for package in packages:
        assert f"**{package}** (`mpc_fl/{package}/`)." in architecture, package
    index = (REPOSITORY / "docs/protocols.md").read_text()
    for page in (REPOSITORY / "docs/protocols").glob("*.md"):
        assert f"(protocols/{page.name})" in index, page
        text = page.read_text()
        assert "**In words.**" in text and "```mermaid" in text, page


def test_the_page_of_all_settings_is_of_this_version() -> None:
    made = CliRunner().invoke(config_commands.app, ["explain", "--markdown"])
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    assert made.output == page, "write it anew: mpc-fl config explain --markdown > docs/settings.md"


def values_of(section: type[BaseModel], setting: str) -> set[str]:
    """All that a setting with a fixed choice may be."""
    return set(get_args(section.model_fields[setting].annotation))


def paragraph(beginning: str) -> str:
    """That paragraph of docs/data.md which holds these words, on one line."""
    (found,) = (text for text in (REPOSITORY / "docs/data.md").read_text().split("\n\n") if beginning in text)
    return " ".join(found.split())


def in_code(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_the_page_of_data_lists_the_columns_and_splits_of_the_table_of_patients() -> None:
    said = paragraph("**A table** `DIR/patients.csv`")
    said = said[: said.index("**The header**")]
    splits = re.search(r"a column `split` \(([a-z, ]+)\)", said)
    assert splits and tuple(splits[1].split(", ")) == get_args(Part)
    columns = {"file", *PatientRow.__dataclass_fields__}
    folders, settings = {"train", "validation"}, {"data.validation_fraction"}
    assert {name for name in in_code(said) if "." not in name} - folders == columns
    assert {name for name in in_code(said) if name.startswith("data.")} == settings


def test_the_page_of_data_lists_all_that_a_column_may_be() -> None:
    page = (REPOSITORY / "docs/data.md").read_text()
    kinds = re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)
    assert set(kinds) == values_of(ColumnSection, "kind") and len(kinds) == 4
    assert values_of(ColumnSection, "missing") <= in_code(paragraph("`missing` says what becomes"))
    (example,) = re.findall(r"```yaml\n(data:.*?)```", page, re.DOTALL)
    table = parse_yaml(example, takes_text)["data"]["table"]
    parse_config(parse_yaml(example, takes_text), "the example")
    assert {key for column in table["columns"] for key in column} == set(ColumnSection.model_fields)
    assert {column["kind"] for column in table["columns"]} == values_of(ColumnSection, "kind")
    for setting in TableSection.model_fields:
        assert setting in table or f"data.table.{setting}" in page, setting


def test_the_page_of_data_lists_what_becomes_of_films() -> None:
    page = (REPOSITORY / "docs/data.md").read_text()
    assert values_of(DataSection, "not_square") <= in_code(paragraph("`data.not_square`: `pad`"))
    assert values_of(DataSection, "frame") - {"error"} <= in_code(paragraph("unless `data.frame` is"))
    for setting in ("wrong_size", "unit"):
        (other,) = values_of(DataSection, setting) - {DataSection.model_fields[setting].default}
        assert f"`data.{setting}: {other}`" in page, setting
    assert f"`data.most_unreadable` ({DataSection.model_fields['most_unreadable'].default:g})" in page
    brightness = paragraph("2. Without a window by the bits")
    *bits, most = map(str, windows._USUAL_BITS)
    low, high = windows._PERCENTILES
    assert f"the range of {', '.join(bits)} or {most} bits" in brightness
    assert f"from {low:g} to {high:g} % of its values" in brightness
    assert windows._LEAST_SHARE == 1 / 8 and "less than an eighth of their range" in brightness


def test_the_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 160 for line in lines if line.startswith("|"))


def test_no_document_speaks_of_a_file_that_readers_do_not_have() -> None:
    for document in DOCUMENTS:
        assert "DESIGN" not in document.read_text(), document
