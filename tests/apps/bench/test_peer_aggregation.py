"""The benchmark of a sum among peers: what it measures is a real sum, at the bytes that are stated."""

from __future__ import annotations

import sys

import pytest

from mpc_fl.apps.bench.peer_aggregation import measure_peer_aggregation
from mpc_fl.apps.cli import main as cli


@pytest.mark.processes
@pytest.mark.slow
def test_both_arrangements_are_measured_and_the_sum_is_that_of_the_updates() -> None:
    parameters = 200_000
    figures = measure_peer_aggregation(3, parameters, 2, "none", left_out=True)
    assert figures.exact
    for sent, of_parameters in (
        (figures.bytes_sent_per_hospital, 8 * parameters * 2 // 3),
        (figures.bytes_sent_per_hospital_with_aggregator, 4 * parameters),
    ):
        assert 0 < sent - of_parameters < 20_000
    said = figures.to_json()
    assert said["coordinator"] == "none" and "seconds_crypten" not in said
    assert said["ratio_to_aggregator"] == figures.seconds / figures.seconds_with_aggregator > 0
    assert said["linear_check_share"] == figures.seconds_linear_check / figures.seconds > 0


def test_two_hospitals_have_no_sum_among_peers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "aggregation", "--coordinator", "none", "--parties", "2"]
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code != 0 and "at least 3 without a coordinator" in said.err.replace("\n", " "), said
