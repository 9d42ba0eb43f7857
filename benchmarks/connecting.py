"""Seconds until all parties of a federation are connected: each a process of this machine, started at once, with default deadlines.

    python benchmarks/connecting.py [--hospitals N] [--json]

Every party does what a hospital does before the first round, but reads no data: it is forked from a process that has imported
what all need, and makes its links (`links.party_links.connect`). Printed: seconds from the first start until the last party has
connected, the longest time that a party waited for others, processor time of all parties and of one link at both its ends.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

SHARED = ("torch", "mpc_fl.links.party_links")


def party_process(pipe: Connection) -> NoReturn:
    """A party: connect, tell how long that took, stay until the measurement ends."""
    from mpc_fl.apps.runs.party_process import wait_for_locks_with_patience
    from mpc_fl.config.config import parse_config
    from mpc_fl.errors import MpcFlError
    from mpc_fl.links.party_links import connect

    told = json.loads(pipe.recv_bytes())
    config = parse_config(told["values"], "connecting")
    wait_for_locks_with_patience()
    began = time.monotonic()
    try:
        with connect(config, told["name"]):
            used = resource.getrusage(resource.RUSAGE_SELF)
            event = {"waited": time.monotonic() - began, "processor": used.ru_utime + used.ru_stime}
            pipe.send_bytes(json.dumps(event).encode())
            pipe.poll(None)  # until the others are there, too
            os._exit(0)
    except MpcFlError as error:
        pipe.send_bytes(json.dumps({"error": str(error)}).encode())
    os._exit(1)


def measured(hospitals: int) -> dict[str, Any]:
    """Connect so many hospitals and their aggregator. Raises `SystemExit` with what the first party that failed said."""
    from mpc_fl.apps.runs.local_parties import place_parties
    from mpc_fl.apps.runs.party_starter import PartyStarter
    from mpc_fl.config.config import Config

    config = Config().with_values(federation={"hospitals": hospitals})
    with tempfile.TemporaryDirectory(prefix="mpc-fl-connecting-") as directory:
        placed = place_parties(config, Path(directory))
        with PartyStarter(SHARED, program="connecting") as starter:
            began = time.monotonic()
            parties = [starter.start(name, values.model_dump(mode="json")) for name, values in placed.items()]
            events = [json.loads(party.pipe.recv_bytes()) for party in parties]
            seconds = time.monotonic() - began
    for event in events:
        if "error" in event:
            raise SystemExit(event["error"])
    links = hospitals * (hospitals + 1) // 2
    processor = sum(event["processor"] for event in events)
    return {
        "parties": len(events),
        "links": links,
        "seconds": round(seconds, 2),
        "longest_wait": round(max(event["waited"] for event in events), 2),
        "processor_seconds": round(processor, 2),
        "processor_ms_per_link": round(1000 * processor / links, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hospitals", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # where the parties' processes find this module
    found = measured(arguments.hospitals)
    print(json.dumps(found) if arguments.json else "\n".join(f"{name:24}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
