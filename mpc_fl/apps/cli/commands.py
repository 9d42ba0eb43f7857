"""All commands of `mpc-fl`, in the order of its help. A group's module is imported only when one of its commands is called."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.main import get_group

from mpc_fl.apps.cli import beginning, comparison, diagnosis, exporting, simulating, sites, training, tuning
from mpc_fl.apps.cli.options import Command, Group

# Each the first sentence of the group's own help.
GROUPS = {
    "config": "Explain the settings of a configuration.",
    "model": "Bring weights that others trained, and look into model files.",
    "pki": "Decide who belongs to the federation: its authority and certificates.",
    "bench": "Measure parts of the runtime on this machine, beside what they replace, in one run.",
    "ledger": "Read and check the reveal ledger of a run.",
    "audit": "Measure what a run shows of patients, beside what it promises.",
    "dealer": "Make correlated randomness ahead of diagnoses.",
}


class _Commands(Group):
    """The commands, with the groups that are not imported yet standing as names with a line of help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and remaining arguments. Raises a usage error when there is no such command."""
        if args[0] in GROUPS:
            self.add_command(get_group(importlib.import_module(f"mpc_fl.apps.cli.{args[0]}").app), args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="mpc-fl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hospitals learn together and diagnose together on secret-shared tensors. Start with: make demo",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        import mpc_fl

        sys.stdout.write(f"mpc-fl {mpc_fl.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass  # the options of mpc-fl itself act where they are read


for command in (beginning.init, training.train, diagnosis.infer, diagnosis.serve, sites.report, comparison.compare,
                exporting.export, sites.party, training.check, training.estimate, tuning.tune, simulating.simulate):  # fmt: skip
    app.command(cls=Command)(command)
for group, summary in GROUPS.items():
    app.add_typer(typer.Typer(help=summary), name=group)
