"""Which party a process is: by word or by the launcher's conventions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.apps.runs.placement import party_of, site_of
from mpc_fl.config.config import Config, party_names
from mpc_fl.errors import ConfigError

NAMES = ["hospital-0", "hospital-1", "hospital-2", "aggregator"]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environment", "party"),
    [
        (TORCHRUN, "aggregator"),
        (SLURM, "hospital-1"),
        (KUBERNETES, "hospital-2"),
        (TORCHRUN | SLURM, "aggregator"),
        (SLURM | KUBERNETES, "hospital-1"),
        ({"RANK": "", **SLURM}, "hospital-1"),
    ],
)
def test_the_environment_places_a_process_the_innermost_launcher_first(environment: dict[str, str], party: str) -> None:
    assert party_of(Config(), None, None, environment) == party


@given(hospitals=st.integers(2, 64), task=st.sampled_from(["train", "infer"]))
def test_every_rank_is_one_party_and_every_party_one_rank(hospitals: int, task: str) -> None:
    config = Config().with_values(federation={"hospitals": hospitals}, task=task)
    names = party_names(config)
    for rank in range(len(names)):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(len(names))}
        assert party_of(config, None, None, environment) == party_of(config, None, rank, {}) == names[rank]
        assert party_of(config, names[rank], None, {}) == names[rank]


@pytest.mark.parametrize(
    ("role", "rank", "party"),
    [
        ("hospital", 2, "hospital-2"),
        ("hospital-2", None, "hospital-2"),
        ("hospital-2", 2, "hospital-2"),
        ("aggregator", None, "aggregator"),
        ("aggregator", 3, "aggregator"),
        (None, 0, "hospital-0"),
    ],
)
def test_what_is_said_wins_over_the_environment(role: str | None, rank: int | None, party: str) -> None:
    for environment in ({}, TORCHRUN, SLURM, KUBERNETES, {"RANK": "x", "WORLD_SIZE": "9"}):
        assert party_of(Config(), role, rank, environment) == party


def test_a_diagnosis_has_one_hospital_which_needs_no_rank() -> None:
    config = Config().with_values(task="infer")
    assert party_of(config, "hospital", None, {}) == "hospital-0"
    assert party_of(config, None, None, {"JOB_COMPLETION_INDEX": "2"}) == "dealer"


def test_a_party_may_be_said_by_the_name_that_its_site_chose() -> None:
    config = Config().with_values(federation={"names": {"hospital-1": "charite", "aggregator": "rki"}})
    assert party_of(config, "charite", None, {}) == "hospital-1"
    assert party_of(config, "rki", None, {}) == "aggregator"
    with pytest.raises(ConfigError, match="there is no party 'char1te'"):
        party_of(config, "char1te", None, {})


@pytest.mark.parametrize(
    ("role", "rank", "environment", "message"),
    [
        (None, None, {}, "nothing says which party"),
        (None, None, {"RANK": "0", "WORLD_SIZE": "5"}, "WORLD_SIZE is 5, the configuration has 4 parties"),
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, "SLURM_NTASKS is 3, the configuration has 4 parties"),
        (None, None, {"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, the 4 parties have ranks 0 to 3"),
        (None, None, {"JOB_COMPLETION_INDEX": "7"}, "JOB_COMPLETION_INDEX is 7, the 4 parties"),
        (None, None, {"RANK": "-1", "WORLD_SIZE": "4"}, "RANK is '-1', not a number"),
        (None, None, {"RANK": "1"}, "WORLD_SIZE is '', not a number"),
        (None, 4, {}, "--rank is 4"),
        ("hospital", None, TORCHRUN, "3 hospitals: say which with --rank 0 to 2"),
        ("hospital", 3, {}, "no party 'hospital-3'"),
        ("hospital-1", 2, {}, "hospital-1 has rank 1, not 2"),
        ("aggregator", 0, {}, "aggregator has rank 3, not 0"),
        ("dealer", None, {}, "no party 'dealer' in this task"),
        ("hospital-", None, {}, "no party 'hospital-'"),
    ],
)
def test_contradictions_are_named(
    role: str | None, rank: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        party_of(Config(), role, rank, environment)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_paths_of_a_site_name_the_party() -> None:
    given_paths = {"out": "/run/{party}", "identity": "/keys/{party}/{party}", "data": "/data"}
    config = Config().with_values(site=given_paths, name="{party}")
    placed = site_of(config, "hospital-1")
    assert placed.site.out == Path("/run/hospital-1") and placed.site.identity == Path("/keys/hospital-1/hospital-1")
    assert placed.site.data == Path("/data") and placed.site.model is None
    assert placed.digest() == config.digest() and placed.name == "{party}"
