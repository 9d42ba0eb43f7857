"""Who dials whom where some parties say their address only when they join."""

from __future__ import annotations

from mpc_fl.links.routes import Route, routes

PARTIES = ["hospital-0", "hospital-1", "hospital-2", "hospital-3"]
ADDRESSES = {"hospital-0": "a:1", "hospital-1": "b:1"}
LATER = ["hospital-2", "hospital-3"]


def test_of_two_that_announce_themselves_the_later_dials_when_it_knows_where() -> None:
    found = {name: routes(name, PARTIES, ADDRESSES, (), LATER) for name in PARTIES}
    assert found["hospital-3"] == {
        "hospital-0": Route("dial", "a:1"),
        "hospital-1": Route("dial", "b:1"),
        "hospital-2": Route("dial", ""),
    }
    assert found["hospital-2"]["hospital-3"] == Route("await")
    assert found["hospital-0"]["hospital-3"] == found["hospital-1"]["hospital-2"] == Route("await")
    assert found["hospital-1"]["hospital-0"] == Route("dial", "a:1")
