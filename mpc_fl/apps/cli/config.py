"""`mpc-fl config explain | schema`: what can be set, what it does, and a schema for editors."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, print_json, say

if TYPE_CHECKING:
    from mpc_fl.config.settings import SectionText, Setting

app = typer.Typer(
    cls=Group,
    name="config",
    no_args_is_help=True,
    add_completion=False,
    help="""Explain the settings of a configuration.

    A configuration is a YAML file of sections; what it leaves out has a
    default. --set SECTION.KEY=VALUE overrides a value on the command line.
    """,
)

_PAGE = """# Settings

All settings of a configuration, made from the program itself by

    mpc-fl config explain --markdown > docs/settings.md

A configuration is a YAML file of these sections; what it leaves out has its default. Every command takes `--set SECTION.KEY=VALUE`
besides. `mpc-fl config explain KEY` says the same of one setting, `mpc-fl config schema` is for editors. All parties of a run
have the same values, but for `site`, which is each machine's own, and `serving`, which is the model owner's."""


@app.command(cls=Command)
def explain(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="A setting, a section, or nothing for all.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as a page of markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a setting does, what it may be, its default, and an example.

    Of a section: what it is about, and all of its settings. For example:
    mpc-fl config explain privacy.spare_rounds
    """
    from mpc_fl.config.settings import sections, setting

    chosen = [section for section in sections() if key in (None, section.key)]
    if not chosen and key is not None:
        found = setting(key)
        print_json(asdict(found)) if as_json else say(_in_words(found))
    elif as_json:
        print_json({"sections": [asdict(section) for section in chosen]})
    elif markdown:
        say("\n\n".join([_PAGE, *(_as_markdown(section) for section in chosen)]))
    else:
        for section in chosen:
            say(f"{section.key or 'all'}\n")
            say(_indented(section.about) + "\n")
            for item in section.settings:
                say(f"  {item.key}: {item.default}    [{item.kind}]  {item.about}")
            inner = [item.key for item in sections() if section.key and item.key.startswith(f"{section.key}.")]
            say(f"\n  Within it: {', '.join(inner)}\n" if inner and key is not None else "")


@app.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of a configuration file.

    Editors that know YAML schemas then complete keys and mark mistakes:
    mpc-fl config schema > mpc-fl.schema.json, and in the first line of a
    configuration: # yaml-language-server: $schema=mpc-fl.schema.json
    """
    from mpc_fl.config.settings import schema as schema_of_settings

    print_json(schema_of_settings())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _in_words(item: Setting) -> str:
    section = item.key.rpartition(".")[0]
    return "\n".join(
        [
            item.key,
            f"  {item.about}",
            f"  may be:  {item.kind}",
            f"  default: {item.default}",
            f"  example: {_set(item)}",
            *([f"  section: mpc-fl config explain {section}"] if section else []),
        ]
    )


def _set(item: Setting) -> str:
    """The option that sets it to its example, as a shell takes it."""
    return f"--set {shlex.quote(f'{item.key}={item.example}')}"


def _as_markdown(section: SectionText) -> str:
    """A heading, the section's text, a table of its settings."""
    head = f"## {section.key or 'Whole configuration'}\n\n{section.about}"
    rows = [
        f"| `{item.key}` | {_cell(item.kind)} | `{item.default}` | {_cell(item.about)} |" for item in section.settings
    ]
    if not rows:
        return head
    return "\n".join([head, "", "| key | may be | default | what it does |", "| --- | --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
