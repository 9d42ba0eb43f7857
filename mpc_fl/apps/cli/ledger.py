"""`mpc-fl ledger verify | show`: what a run revealed, to whom, and whether anybody changed the record of it."""

from __future__ import annotations

import datetime
import glob
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpc_fl.apps.cli.options import AsJson, Command, Group, cell, output_console, print_json, say
from mpc_fl.audit.ledger_audit import Copy, Finding, Verdict, parse_line, verify_copies
from mpc_fl.audit.ledger_file import earlier_authorities
from mpc_fl.audit.named_parties import names_in
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.peer_record import lines_of, without_record
from mpc_fl.audit.receipt_audit import are_receipts, check_lines, compare
from mpc_fl.audit.receipts import RECEIPTS_FILE
from mpc_fl.audit.record_audit import RecordCopy, verify_records
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, UNCONFIRMED_FILE, Block, ChainedOpening, to_json
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.crypto.certificates import ROOT_FILE, load_root
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import MpcFlError

app = typer.Typer(
    cls=Group,
    name="ledger",
    no_args_is_help=True,
    add_completion=False,
    help="""Read and check the reveal ledger of a run.

    Every opening of a secret-shared value is in it: what, to whom, why, who
    took part. After each round all parties sign it with the keys of their
    certificates, each keeps a copy, and nothing in it can be changed unseen.
    """,
)

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run, or of one party of it.")]


@app.command(cls=Command)
def verify(
    run_dir: RunDirectory,
    authority: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"The federation's certificate. Default: {ROOT_FILE} of the run."),
    ] = None,
    copies: Annotated[
        list[Path] | None,
        typer.Option("--copy", metavar="FILE", help="The copy of another party, to compare with; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that nobody changed the reveal ledger: edits, removals, additions, exchanges, foreign signatures.

    What each party recorded (openings.jsonl beside its copy) is compared with
    it: an opening that was begun and signed nowhere is a finding. A block
    counts only if a quorum of hospitals signed it. Receipts of diagnoses by a
    model owner that stays up (receipts.jsonl) are checked too.

    Needs the ledger and the authority's certificate, nothing else. Prints one
    line per finding and ends with exit status 1 if there is one. Whoever could
    exchange RUN_DIR could exchange its certificate too: give the one that you
    hold yourself with --authority, or compare the fingerprint that is printed.
    """
    given_copies = [Copy(str(path), None, _read(path)) for path in copies or []]
    found = _find(run_dir) + [copy for copy in given_copies if not are_receipts(copy.content)]
    receipts = _find(run_dir, RECEIPTS_FILE) + [copy for copy in given_copies if are_receipts(copy.content)]
    if not found and not receipts:
        raise MpcFlError(f"{run_dir} holds no {LEDGER_FILE}", "give the directory of a run, or of one party of it")
    given, place = authority is not None, authority or _authority_of(run_dir)
    root = load_root(_read(place), str(place), "give the federation's certificate with --authority")
    checked = _check_receipts(receipts, root, said=not as_json)
    told = {"authority": str(place), "authority_sha256": fingerprint(root), "authority_given": given}
    if not found:
        print_json({**checked, **told}) if as_json else _say_authority(root, None if given else place)
        if checked["receipt_findings"]:
            raise typer.Exit(1)
        return
    earlier = earlier_authorities(run_dir)
    verdict = verify_copies(found, root, datetime.datetime.now(datetime.UTC), earlier)
    unsigned, notes = verify_records(_records(run_dir), verdict.reference)
    findings = [*verdict.findings, *unsigned, *_changed_files(run_dir, verdict)]
    notes = [*verdict.notes, *notes]
    version, quorum = verdict.reference.chain.version or 1, verdict.reference.chain.quorum
    blocks = [block for block in verdict.reference.blocks if block is not None]
    openings = sum(len(block.openings) for block in blocks)
    where = [copy.where for copy in found]
    if as_json:
        print_json(
            {
                **checked,
                "ok": not findings and checked["ok"],
                "findings": [{**asdict(finding), "line": finding.line} for finding in findings],
                "notes": notes,
                "version": version,
                "quorum": quorum or None,
                "blocks": len(blocks),
                "openings": openings,
                "copies": where,
                **told,
            }
        )
    else:
        names = names_in(verdict.reference.blocks, root)
        for text in [*(finding.line for finding in findings), *(f"Note: {note}." for note in notes)]:
            say(names.in_text(text))
        say(f"{len(where)} {_plural(len(where), 'copy', 'copies')}: {', '.join(where)}.")
        _say_authority(root, None if given else place)
        if findings:
            say(f"The reveal ledger does NOT verify: {len(findings)} {_plural(len(findings), 'finding', 'findings')}.")
        else:
            signed = f"{openings} {_plural(openings, 'opening', 'openings')} in {len(blocks)} blocks"
            all_of = "all its parties" + (f", {quorum} hospitals or more" if quorum else "")
            say(f"The reveal ledger verifies: {signed}, every block signed by {all_of}, from start to end.")
    if findings or checked["receipt_findings"]:
        raise typer.Exit(1)


def _say_authority(root: x509.Certificate, found: Path | None) -> None:
    """By whose certificate signatures were checked; `found`: where it lay, if nobody gave it."""
    if found is None:
        say(f"SHA-256 of the authority's certificate: {fingerprint(root)}")
        return
    say(f"SHA-256 of the authority's certificate, from {found}: {fingerprint(root)}")
    say(
        "It lies with what it verifies, so this shows that all of it fits together, not that it is your federation's: "
        "compare the SHA-256, or give the certificate that you hold with --authority."
    )


def _check_receipts(files: list[Copy], root: x509.Certificate, said: bool) -> dict[str, Any]:
    """Check files of receipts, alone and against each other; the verdict for JSON, said in words too if that is asked for."""
    checked = {file.where: check_lines(file.content, root) for file in files}
    findings = [
        f"{where}, line {trouble.line}: {trouble.what}" for where, of in checked.items() for trouble in of.troubles
    ]
    findings += compare({where: of.entries for where, of in checked.items()})
    last = {entry.receipt.session: entry.receipt for of in checked.values() for entry in of.entries if entry.receipt}
    images = sum(receipt.images for receipt in last.values())
    for finding in findings if said else ():
        say(finding)
    if said and files:
        what = (
            f"{images} {_plural(images, 'image', 'images')} in {len(last)} {_plural(len(last), 'session', 'sessions')}"
        )
        ends = (
            f"do NOT verify: {len(findings)} {_plural(len(findings), 'finding', 'findings')}" if findings else "verify"
        )
        say(f"The receipts in {', '.join(checked)} {ends}: {what}, signed by hospital and model owner.")
    return {"ok": not findings, "receipt_findings": findings, "sessions": len(last), "images": images}


@app.command(cls=Command)
def show(run_dir: RunDirectory, as_json: AsJson = False) -> None:
    """Show what was opened in each round: to whom, of what shape, why, who took part and who signed.

    Parties are called what the certificates in the ledger call them. Reads
    the first copy in RUN_DIR as it is; mpc-fl ledger verify checks it.
    """
    copies = _find(run_dir)
    if not copies:
        raise MpcFlError(f"{run_dir} holds no {LEDGER_FILE}", "give the directory of a run, or of one party of it")
    blocks = _blocks(copies[0])
    names = names_in(blocks)
    if as_json:
        shown = [{**to_json(block), "told": told} for block, told in zip(blocks, lines_of(blocks), strict=True)]
        print_json({"copy": copies[0].where, "names": dict(names.pairs), "blocks": shown})
        return
    console = output_console()
    for block, told in zip(blocks, lines_of(blocks), strict=True):
        _print_block(console, block, [names.in_text(line) for line in told], names)
    ended = bool(blocks) and blocks[-1].kind == "end"
    if not ended:
        console.print(Text("The end of the run is not in this copy."))
    console.print(Text(f"Not checked here. To check it: mpc-fl ledger verify {run_dir}"))


def _print_block(console: Console, block: Block, told: list[str], names: ChosenNames) -> None:
    """One table per block, its parties and values below. Texts of the ledger are never taken for markup."""
    times = [signature.time for signature in block.signatures]
    signed = f", signed {datetime.datetime.fromisoformat(max(times)):%Y-%m-%d %H:%M:%S} UTC" if times else ""
    console.print(Text(f"Block {block.number}, {block.kind}: {block.about}{signed}", style="bold"))
    for line in told:
        console.print(Text(f"  {line}"))
    if block.members is not None:
        console.print(Text(f"  Session {block.members.session}, configuration {block.members.configuration[:16]}..."))
        console.print(Text(f"  Authority, SHA-256 {block.members.authority}"))
    if block.kind == "abandoned":
        console.print(Text("  Begun, and perhaps not completed, because a party was lost or left out:"))
    if block.openings:
        table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 2))
        for head in ("No.", "What was opened", "Shape", "To", "Why", "Took part", "Privacy spent"):
            table.add_column(head, justify="right" if head == "No." else "left", overflow="fold")
        for opening in block.openings:
            table.add_row(*(cell(names.in_text(text)) for text in _cells(opening, block)))
        console.print(table)
        for line in _agreed_on(block):
            console.print(Text(f"  {line}"))
    for name, digest in without_record(block.values).items():
        console.print(cell(f"  All hold the same {name}, SHA-256 {digest}"))
    signers = [signature.party for signature in block.signatures]
    unsigned = [party for party in block.parties if party not in signers]
    signed_by = f"Signed by {', '.join(signers) or 'nobody'}" + (f"; NOT by {', '.join(unsigned)}" * bool(unsigned))
    console.print(Text(f"  {names.in_text(signed_by)}"))
    console.print()


def _agreed_on(block: Block) -> list[str]:
    """What the parties of each opening had agreed on before it, as far as the ledger's version holds it."""
    if block.version == 1:
        return []
    without = [str(opening.number) for opening in block.openings if opening.transcript is None]
    lines = [
        f"{item.number}: all in it agreed on SHA-256 {item.transcript}" for item in block.openings if item.transcript
    ]
    return [*lines, *([f"No transcript: {', '.join(without)} (opened from shares)"] if without else [])]


def _cells(opening: ChainedOpening, block: Block) -> list[str]:
    shape = " x ".join(map(str, opening.shape)) or "single"
    lost = [party for party in opening.among if party not in block.parties]
    among = "all" if set(opening.among) == set(block.parties) else ", ".join(opening.among)
    if lost:
        among += f" (lost: {', '.join(lost)})"
    privacy = ", ".join(f"{name} {value}" for name, value in (opening.privacy or {}).items()) or "-"
    return [str(opening.number), opening.what, shape, ", ".join(opening.to), opening.why, among, privacy]


def _changed_files(run_dir: Path, verdict: Verdict) -> list[Finding]:
    """Files of the run that are not the ones whose SHA-256 all parties signed in the last block.

    A party that was lost before that may have those of an earlier end that it signed, where the run was given more rounds; one that
    left before any end keeps a model that no end is about.
    """
    ends = [block for block in verdict.reference.blocks if block is not None and block.kind == "end"]
    if not ends or verdict.reference.blocks[-1] is not ends[-1]:
        return []

    def signed(name: str, path: Path) -> str | None:
        own = [block for block in ends if path.parent == run_dir or path.parent.name in block.parties]
        return own[-1].values.get(name) if own else None

    return [
        Finding(f"{path.relative_to(run_dir)} is not the one that all parties signed", ends[-1].number)
        for name in ends[-1].values
        for path in [run_dir / name, *sorted(run_dir.glob(f"parties/*/{glob.escape(name)}"))]
        if Path(name).name == name
        and path.is_file()
        and signed(name, path) not in (None, hashlib.sha256(path.read_bytes()).hexdigest())
    ]


def _find(run_dir: Path, name: str = LEDGER_FILE) -> list[Copy]:
    """The copies in a run's directory: its own, then those of its parties."""
    copies = []
    for path in [run_dir / name, *sorted(run_dir.glob(f"parties/*/{name}"))]:
        if path.is_file():
            owner = None if path.parent == run_dir else path.parent.name
            beside = path.with_name(UNCONFIRMED_FILE)
            unconfirmed = _read(beside) if name == LEDGER_FILE and beside.is_file() else b""
            copies.append(Copy(str(path.relative_to(run_dir)), owner, _read(path), unconfirmed))
    return copies


def _records(run_dir: Path) -> list[RecordCopy]:
    """The records of openings beside the copies in a run's directory."""
    records = []
    for copy in _find(run_dir):
        path = run_dir / Path(copy.where).with_name(OPENINGS_FILE)
        where = str(path.relative_to(run_dir))
        records.append(RecordCopy(where, copy.owner, _read(path) if path.is_file() else None))
    return records


def _blocks(copy: Copy) -> list[Block]:
    blocks = []
    for number, line in enumerate(copy.content.splitlines(), 1):
        try:
            blocks.append(parse_line(line))
        except ValueError:
            raise MpcFlError(
                f"line {number} of {copy.where} is damaged or was edited", "see what with: mpc-fl ledger verify RUN_DIR"
            ) from None
    return blocks


def _authority_of(run_dir: Path) -> Path:
    """The certificate that a run left in its directory, for one party's also in that of the whole run."""
    whole = run_dir.absolute()
    places = [run_dir / ROOT_FILE, *([whole.parents[1] / ROOT_FILE] if whole.parent.name == "parties" else [])]
    for path in places:
        if path.is_file():
            return path
    raise MpcFlError(
        f"there is no {ROOT_FILE} in {run_dir}, the certificate that its signatures are checked with",
        f"give it with --authority: each party has {ROOT_FILE} in the directory that was its --identity",
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MpcFlError(f"cannot read {path}: {error.strerror}", "check the path") from None


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
