"""A certified party that sends without end what nobody asks for: it loses its link, and the others the memory of one bound."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import LinkError, ProtocolError
from tests.support.harness import free_ports, local_links

pytestmark = pytest.mark.processes
NAMES = ["hospital-0", "hospital-1", "aggregator"]


def test_a_hospital_that_floods_the_aggregator_is_refused_and_named(tmp_path: Path) -> None:
    """With the bounds of every run. Objects are reckoned with what they may become, so 35 MB of them are too much."""
    make_local_identities(NAMES, {name: tmp_path / name for name in NAMES})
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    sent: list[int] = []

    def flood() -> None:
        with pytest.raises((LinkError, ProtocolError)), local_links("hospital-1", NAMES, ports, tmp_path) as links:
            for number in range(200):
                links.send_object("aggregator", f"noise {number}", {"noise": "x" * 1_000_000})
                sent.append(number)
            links.receive_object("aggregator", "never")

    def stay() -> None:
        with pytest.raises(LinkError), local_links("hospital-0", NAMES, ports, tmp_path) as links:
            links.receive_object("aggregator", "never")

    def collect() -> Any:
        with local_links("aggregator", NAMES, ports, tmp_path) as links:
            links.receive_object("hospital-0", "summand")

    threads = [threading.Thread(target=target) for target in (flood, stay)]
    for thread in threads:
        thread.start()
    with pytest.raises(ProtocolError, match=r"the link with hospital-1: hospital-1 sent \d+ MiB that nobody has asked"):
        collect()
    for thread in threads:
        thread.join()
    assert len(sent) < 100
