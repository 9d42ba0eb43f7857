"""`mpc-fl export`: a trained model as one file for programs that do not have mpc-fl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mpc_fl.apps.cli.options import (
    AsJson,
    AuthorityOfModel,
    LedgerOfModel,
    Overrides,
    print_json,
    privacy_words,
    say,
)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR_OR_MODEL", help="Directory of a training run or of a party, or its model.safetensors."
        ),
    ],
    form: Annotated[
        Literal["torch", "onnx"],
        typer.Option("--format", help="torch: a .pt2 that torch alone loads. onnx: needs the extra 'export'."),
    ] = "torch",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to. Default: model.pt2 or model.onnx beside the model."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The run's configuration. Default: config.yaml beside the model."),
    ] = None,
    ledger: LedgerOfModel = None,
    authority: AuthorityOfModel = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an earlier export.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the model as one file that loads without mpc-fl, preprocessing included.

    A picture between 0 and 1, or a row of a table in its own units, goes in;
    logits and probabilities come out. What stands between, such as features,
    scale and calibration, is in the file. FILE.json beside it says what goes
    in, column by column, whose model it is and which privacy it has.

    The file is loaded anew by a fresh interpreter and compared with the model
    before it appears. A model that is not the one all parties signed is
    refused. Whoever gets the file has the model, and with public features
    also the public weights, which keep their own licence.

    torch:  torch.export.load("model.pt2").module()(input)
    onnx:   onnxruntime.InferenceSession("model.onnx").run(None, {"input": input})
    """
    from mpc_fl.apps.runs.exporting import Order
    from mpc_fl.apps.runs.exporting import export as write

    done = write(Order(run, form, out, force, config, ledger, authority, tuple(overrides or ())))
    if as_json:
        print_json(
            {
                "file": str(done.path),
                "description": str(done.description),
                "sha256": done.file.sha256,
                "model_sha256": done.origin.sha256,
                "signed_by_all_parties": done.origin.signed,
                "epsilon": done.privacy.epsilon,
                "largest_difference": done.file.difference,
                "loaded_with": done.file.engine,
            }
        )
        return
    say(f"The model file {done.origin.words}{privacy_words(done.privacy.epsilon, done.privacy.noise_multiplier)}.")
    say(
        f"Loaded anew with {done.file.engine}: logits and probabilities of {done.file.records} records differ from the model's "
        f"by {done.file.difference:.1e} at most."
    )
    say(f"Written: {done.path}\nWhat goes in and comes out: {done.description}")
