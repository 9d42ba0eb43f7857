"""Who leaves, joins and comes back while a run among peers goes on, in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpc_fl.audit.ledger_audit import Copy, parse_line, verify_copies
from mpc_fl.audit.ledger_file import now
from mpc_fl.audit.peer_record import lines_of
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block
from mpc_fl.crypto.certificates import load_root
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.files import read_json_lines
from tests.support.peer_rounds import among_peers, model_of, names, require_sound, same
from tests.support.training_in_memory import SETTINGS, Training


def blocks_of(run: Training, name: str) -> list[Block]:
    return [parse_line(line) for line in (run.party(name) / LEDGER_FILE).read_bytes().splitlines()]


def told_of(run: Training, name: str) -> dict[str, list[str]]:
    """What the blocks in the ledger of this hospital tell, by what they are about."""
    blocks = blocks_of(run, name)
    return {block.about: told for block, told in zip(blocks, lines_of(blocks), strict=True)}


def leaving(run: Training, **after: int) -> None:
    """These hospitals leave after these rounds."""
    for name, number in after.items():
        name = name.replace("_", "-")
        run.placed[name] = run.placed[name].with_values(site={"leave_after": number})


@pytest.mark.parametrize("leaver", ["hospital-4", "hospital-2"], ids=["proposes nothing", "proposes the next round"])
def test_one_leaves_and_the_others_go_on(leaver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, training={**SETTINGS["training"], "rounds": 3})
    leaving(run, **{leaver.replace("-", "_"): 1})
    run.run()
    others = [name for name in names(5) if name != leaver]
    require_sound(run, others)
    assert run.said[leaver] == "finished"
    told = told_of(run, others[0])
    of_next = next(lines for about, lines in told.items() if about.startswith("round 2"))
    assert f"Left, as it said: {leaver}" in of_next
    assert not any("Lost" in line for lines in told.values() for line in lines)
    # It has the ledger and the model up to there.
    own = (run.party(leaver) / LEDGER_FILE).read_bytes()
    whole = (run.party(others[0]) / LEDGER_FILE).read_bytes()
    assert whole.startswith(own) and blocks_of(run, leaver)[-1].about.startswith("round 1")
    assert not same(model_of(run, leaver), model_of(run, others[0]))
    assert [line["round"] for line in read_json_lines(run.party(leaver) / ROUNDS_FILE)] == [0, 1]


def test_the_ledger_names_proposers_and_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch)
    leaving(run, hospital_2=1)  # which proposes round 2
    run.run()
    told = told_of(run, "hospital-0")
    assert told["round 1"] == ["Proposed by hospital-1"]
    assert told["round 2 (1)"] == [
        "Proposed by hospital-3, under view 1: the one before came to nothing",
        "Left, as it said: hospital-2",
    ]


def test_too_many_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = among_peers(tmp_path, monkeypatch, 3)
    leaving(run, hospital_2=1)
    run.run()
    assert run.said["hospital-2"] == "finished"
    for name in ("hospital-0", "hospital-1"):
        assert "QuorumError" in run.said[name] or "PeerLostError" in run.said[name], run.said
        assert "hospital-2" in run.said[name]
    authority = load_root(load_identity(run.party("hospital-0") / "identity", "hospital-0").authority, "test")
    copies = [Copy(name, name, (run.party(name) / LEDGER_FILE).read_bytes()) for name in names(3)]
    (missing,) = verify_copies(copies, authority, now()).findings
    assert "the end of the run is missing" in missing.what
