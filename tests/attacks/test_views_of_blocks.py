"""A hospital that holds an older block, which all its parties signed, and says that it is of a later view than the quorum's.

Among peers the complete block of the latest view is finished, so whoever holds one has to prove of which view it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.peer_signing import PeerSigners
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block
from mpc_fl.errors import SumLostError
from mpc_fl.federation.peer_attendance import PeerAttendance
from mpc_fl.federation.peer_proposal import Complete, Proposals
from mpc_fl.federation.peer_settling import Settling
from tests.support.peer_rounds import among_peers, names, require_sound
from tests.support.peer_sums import only_at

DEVIATES, KEEPS, QUORUM = "hospital-3", "hospital-0", 4  # of round 1; `KEEPS` alone keeps what the quorum has


def test_an_older_block_is_not_preferred_to_the_one_that_a_quorum_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """View 0: it gives up when it has the signatures of all. View 1: one hospital keeps the block that all signed then, and is lost
    before the others hear it. View 2: it proposes something false. View 3: it says that the block of view 0 is one of view 2."""
    old, gave_up = list[Block](), list[str]()

    def keep(original: Any, self: PeerSigners, complete: Block, others: Any) -> Block:
        if complete.about == "round 1":
            old.append(complete)
        if complete.about in ("round 1", "round 1 (1)") and complete.about not in gave_up:
            gave_up.append(complete.about)
            raise SumLostError("a block that nothing was lost of", "")
        return original(self, complete, others)  # type: ignore[no-any-return]

    def say(original: Any, self: PeerSigners, to: Any, tag: str, value: Any) -> None:
        if (tag, self.drafted and self.drafted.about) != ("signed", "round 1"):
            original(self, to, tag, value)

    def present(original: Any, self: Proposals, standing: Any, view: int, reason: Any, ledger: Any, own: Any) -> Any:
        if standing.number == 1 and view < 4:
            own = Complete(2, old[0]) if view == 3 else None
        return original(self, standing, view, reason, ledger, own)

    def proposed(original: Any, self: Proposals, standing: Any, *rest: Any) -> Any:
        values = original(self, standing, *rest)
        if (values["number"], values["view"]) == (1, 2):
            values["hospitals"] = [name for name in values["hospitals"] if name != DEVIATES]
        return values

    def completed(original: Any, self: Settling, own: Any, *rest: Any) -> Any:
        claims = bool(old) and self.present[DEVIATES].complete == old[0].seal()
        return original(self, Complete(2, old[0]) if claims else own, *rest)

    def says_nothing(original: Any, self: PeerSigners, to: Any, tag: str, value: Any) -> None:
        if tag != "complete" or self.drafted is None or self.drafted.about != "round 1 (1)":
            original(self, to, tag, value)

    def keeps_and_is_lost(original: Any, self: PeerSigners, complete: Block, others: Any) -> Block:
        kept: Block = original(self, complete, others)
        if complete.about == "round 1 (1)":
            run.network.drop(KEEPS)
        return kept

    run = among_peers(tmp_path, monkeypatch, federation={"quorum": QUORUM})
    for where, name, deviation in (
        (PeerSigners, "keep", keep), (PeerSigners, "_say", say), (Proposals, "own_presence", present),
        (Proposals, "proposed", proposed), (Settling, "completed", completed),
        (PeerAttendance, "_require_recalled", lambda original, self, *rest: None),
    ):  # fmt: skip
        only_at(monkeypatch, DEVIATES, where, name, deviation)
    only_at(monkeypatch, KEEPS, PeerSigners, "_say", says_nothing)
    only_at(monkeypatch, KEEPS, PeerSigners, "keep", keeps_and_is_lost)
    run.run()
    assert old
    lines = {name: (run.party(name) / LEDGER_FILE).read_bytes().splitlines() for name in names(5)}
    kept = lines[KEEPS]
    assert parse_line(kept[-1]).about == "round 1 (1)"
    assert all(each[: len(kept)] == kept for each in lines.values()), [
        parse_line(each[2]).about for each in lines.values()
    ]
    assert any(f"{DEVIATES} says that it holds a block of view 2, which is of another one" in line for line in run.log)
    require_sound(run, [name for name in names(5) if name != KEEPS])
