"""What an article is made of, and the same article as one HTML page or as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from mpc_fl.apps.report.figures import svg_uri
from mpc_fl.apps.report.markup import Markup, escape, paragraph, plot, table
from mpc_fl.apps.report.page import document
from mpc_fl.files import written_whole


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is plain, key (what matters most) or warning. Lines and spaces in `words` are those of the source."""

    words: str
    kind: str = "plain"

    @property
    def line(self) -> str:
        """In one line."""
        return " ".join(self.words.split())


@dataclass(frozen=True)
class Heading:
    """Within a section."""

    words: str


@dataclass(frozen=True)
class Table:
    """Rows below `head`, of which the last `numbers` columns are numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    numbers: int


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is that of its file beside Markdown."""

    figure: Figure
    name: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Commands, a line each."""

    words: str


Block = Text | Heading | Table | Picture | Code


@dataclass(frozen=True)
class Article:
    """`sections` by title, in order. `synthetic`: of phantoms; `remark` is said above all of it, if anything."""

    title: str
    sections: dict[str, list[Block]]
    synthetic: bool = False
    remark: str = ""


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return paragraph(block.line, block.kind)
    if isinstance(block, Heading):
        return f"<h3>{escape(block.words)}</h3>"
    if isinstance(block, Table):
        return table(block.caption, block.head, block.rows, block.numbers)
    if isinstance(block, Picture):
        return plot(block.figure, block.alt, block.caption)
    return f"<pre>{escape(block.words)}</pre>"


def as_html(article: Article) -> str:
    """One page without anything from elsewhere."""
    sections = {escape(name): Markup("".join(map(_html, blocks))) for name, blocks in article.sections.items()}
    return document(article.title, article.synthetic, sections, article.remark)


def _cells(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown(block: Block, stem: str) -> str:
    if isinstance(block, Text):
        return f"**{block.line}**" if block.kind == "warning" else block.line
    if isinstance(block, Heading):
        return f"### {block.words}"
    if isinstance(block, Table):
        lines = [_cells(block.head), _cells(["---"] * len(block.head)), *map(_cells, block.rows)]
        return f"{block.caption}.\n\n" + "\n".join(lines)
    if isinstance(block, Picture):
        return f"![{block.alt}]({stem}-{block.name}.svg)\n\n{block.caption}"
    return "\n".join(f"    {line}" for line in block.words.splitlines())


def as_markdown(article: Article, stem: str) -> str:
    """The article for a folder in which its pictures are called `stem`-<name>.svg."""
    remarks = [text for text in ("Of phantoms, not of patients." * article.synthetic, article.remark) if text]
    parts = [f"# {article.title}", *(f"**{text}**" for text in remarks)]
    for name, blocks in article.sections.items():
        parts += [f"## {name}", *(_markdown(block, stem) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def write_html(article: Article, file: Path) -> None:
    """Raises `MpcFlError` where it cannot be written."""
    _write(file, as_html(article).encode())


def write_markdown(article: Article, file: Path) -> None:
    """The text, and its pictures as SVG beside it. Raises `MpcFlError` where they cannot be written."""
    for blocks in article.sections.values():
        for block in blocks:
            if isinstance(block, Picture):
                _, _, content = svg_uri(block.figure).partition(",")
                _write(file.with_name(f"{file.stem}-{block.name}.svg"), base64.b64decode(content))
    _write(file, as_markdown(article, file.stem).encode())


def _write(file: Path, content: bytes) -> None:
    with written_whole(file, 0o644) as place:
        place.write_bytes(content)
