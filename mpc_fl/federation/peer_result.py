"""What a round among peers gave at a hospital beside its state, and how that is written down in this site's own files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.federation.peer_state import KeptState, Peer, checkpoint
from mpc_fl.files import append_json_line, keep_json_lines
from mpc_fl.links.party_links import site_directory


@dataclass
class Result:
    """What a round gave beside its state: who was in it, the lines about it, and its digest, `made`, once it is there.

    `refused`: who was not shown to be within the norm bound, as the block tells it. `drafted` is the block that this hospital has
    signed of it, if any; `state` what to go back to where it has been made anew.
    """

    hospitals: tuple[str, ...] = ()
    opened: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    made: str = ""
    seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    drafted: Block | None = None
    state: KeptState | None = None


def write_down(peer: Peer, number: int, result: Result) -> None:
    """What there is of round `number` in this site's own files, before all sign it: who has signed has kept what it takes to go on.

    Of the end of a run, which comes after the last round, nothing is written here.
    """
    config = peer.hospital.config
    if number > config.last_round:
        return
    out = site_directory(config)
    for name in (ROUNDS_FILE, "metrics.jsonl"):
        keep_json_lines(out / name, lambda line: line["round"] < number)
    line = {"round": number, "hospitals": list(result.hospitals), "seconds": result.seconds}
    append_json_line(out / ROUNDS_FILE, {"evaluation": None, **line, **result.opened})
    if number and result.own is not None:
        append_json_line(out / "metrics.jsonl", result.own)
    checkpoint(peer, out, number)
