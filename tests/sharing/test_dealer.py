"""Dealer and parties as processes: tuples alone and in programs made ahead of need, deviations, losses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.errors import ProtocolError
from mpc_fl.sharing.correlated_randomness import Request
from tests.support.dealing import (
    FRAMES,
    WORLD,
    additive,
    check_tuple,
    client_of,
    deal_all,
    note_frame,
    opened,
    run_of,
    shares_of,
)
from tests.support.harness import SPAWN, free_ports, local_links, run_parties

Outcomes = Callable[[str], dict[str, Any]]

EVERY_KIND = [
    additive("mul", (3, 1, 2), (4, 1)),
    additive("matmul", (3, 4), (4, 2)),
    additive("conv1d", (2, 4, 9), (6, 2, 3), stride=2, padding=(1,), dilation=2, groups=2),
    additive("conv2d", (2, 4, 9, 8), (6, 2, 3, 2), stride=(2, 1), padding=(1, 2), dilation=[2, 1], groups=2),
    additive("conv_transpose1d", (2, 4, 5), (4, 3, 3), stride=2, padding=1, output_padding=1, groups=2),
    additive("conv_transpose2d", (1, 4, 5, 4), (4, 2, 3, 3), stride=(2, 1), padding=1, dilation=2, groups=2),
    Request("square", ((2, 5),)),
    Request("binary", ((2, 4), (1, 4))),
    Request("wraps", ((500,),)),
    Request("B2A", ((2, 7),)),
    Request("square", ((),)),
    Request("binary", ((0, 3), (3,))),
]
# Three blocks of 1.2 MB and a small one.
LARGE = [*[Request("square", ((150_000,),))] * 3, Request("B2A", ((10,),))]


def every_kind_alone_and_in_programs(links: Any) -> Any:
    """Each tuple alone, a program that is followed first, then declared, then prepared, dropped and run again."""
    if links.name == "dealer":
        dealer = deal_all(links)
        return {"frames": FRAMES, "served": dealer.served, "ahead": dealer.ahead, "elements": dealer.elements}
    client = client_of(links)
    result: dict[str, Any] = {"alone": shares_of(client, EVERY_KIND)}

    def run(name: str, asked: list[Request], following: str | None = None) -> list[Any]:
        before = sum(count.messages_sent for phase in links.traffic.values() for count in phase.values())
        with client.program(name, following):
            shares = shares_of(client, asked)
        after = sum(count.messages_sent for phase in links.traffic.values() for count in phase.values())
        result[f"messages {len(result)} {name}"] = after - before
        return shares

    result["followed"] = run("kinds", EVERY_KIND)
    result["second"] = run("kinds", EVERY_KIND, "kinds")
    client.declare("large", LARGE)
    result["large"] = run("large", LARGE)  # "kinds" was prepared and is dropped
    client.prepare("large")
    client.prepare("kinds")  # "large" is dropped
    result["prepared"] = run("kinds", EVERY_KIND)
    client.prepare("kinds")  # never run
    client.finish()
    return result


@pytest.fixture(scope="module", params=[2, 3, 5])
def dealt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [f"party-{rank}" for rank in range(request.param)] + ["dealer"]
    directory = tmp_path_factory.mktemp("dealt")
    return run_parties(every_kind_alone_and_in_programs, names, directory, observer=note_frame)


@pytest.mark.processes
def test_every_kind_alone_and_in_programs(dealt: dict[str, Any]) -> None:
    for phase in ("alone", "followed", "second", "prepared"):
        for position, request in enumerate(EVERY_KIND):
            check_tuple(request, opened(dealt, phase, position))
    for position, request in enumerate(LARGE):
        check_tuple(request, opened(dealt, "large", position))


@pytest.mark.processes
def test_no_value_is_drawn_twice(dealt: dict[str, Any]) -> None:
    """Dropped runs included, since the runs before and after them differ. Words of 64 bits repeat once in 10^13 runs."""
    words = []
    for phase in ("alone", "followed", "second", "prepared", "large"):
        asked = LARGE if phase == "large" else EVERY_KIND
        for position, request in enumerate(asked):
            if request.kind != "B2A":
                words += [share.reshape(-1) for shares in opened(dealt, phase, position) for share in shares]
    drawn = torch.cat(words)
    assert len(drawn) > 900_000 and len(drawn.unique()) == len(drawn)


@pytest.mark.processes
def test_a_declared_program_takes_one_message_of_each_party(dealt: dict[str, Any]) -> None:
    for rank, result in enumerate(run_of(dealt)):
        messages = {key.split(" ", 2)[2] + key.split(" ")[1]: count for key, count in result.items()
                    if key.startswith("messages")}  # fmt: skip
        counts = list(messages.values())
        last = rank == len(dealt) - 2
        # Followed: one request per tuple, one declaration. Declared: the start; the last party also reports the end.
        assert counts == [len(EVERY_KIND) + 1, *[2 if last else 1] * 3]
    frames = [frame for frame in dealt["dealer"]["frames"] if frame[2] == "dealer control"]
    kinds = [payload["kind"] for peer, _, _, payload in frames if peer == "party-0"]
    assert kinds.count("request") == 2 * len(EVERY_KIND)
    assert [kind for kind in kinds if kind != "request"] == [
        "declare", "run", "declare", "run", "prepare", "prepare", "run", "prepare", "finish"]  # fmt: skip
    assert dealt["dealer"]["served"] >= 4 * len(EVERY_KIND) + len(LARGE)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in [*value.keys(), *value.values()] for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


@pytest.mark.processes
def test_the_dealer_sees_operations_and_shapes_only(dealt: dict[str, Any]) -> None:
    """Every message to the dealer is control, and holds known words, sizes below 10^6 and counts, nothing of 64 bits."""
    words = {"kind", "program", "requests", "more", "ahead_bytes", "instance", "following", "request", "shapes",
             "operation", "options", "stride", "padding", "output_padding", "dilation", "groups", "blocks", "complete",
             "declare", "run", "prepare", "finish", "additive", "square", "binary", "wraps", "B2A", "mul", "matmul",
             "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "kinds", "large", "", 256 << 20}  # fmt: skip
    frames = [frame for frame in dealt["dealer"]["frames"] if frame[1] not in ("HELLO", "WELCOME", "BYE")]
    assert frames and {kind for _, kind, _, _ in frames} == {"OBJECT"}
    for _, _, tag, payload in frames:
        assert tag in ("dealer control", "dealer consumed")
        for leaf in leaves(payload):
            assert leaf in words or (isinstance(leaf, int) and 0 <= leaf < 10**6), leaf


def bounded_program(links: Any, limit: int, blocks_ahead: int) -> Any:
    """The dealer serves as far as the bound allows before the parties, whom it then tells, consume anything."""
    if links.name == "dealer":
        from mpc_fl.sharing.dealer import Dealer

        dealer, peak = Dealer(links, WORLD, limit), 0
        for _ in range(2 + blocks_ahead):  # declare, prepare, blocks
            assert dealer.serve_one()
            peak = max(peak, dealer.outstanding)
        for name in WORLD:
            links.send_object(name, "stalled", {})
        while dealer.serve_one():
            peak = max(peak, dealer.outstanding)
        return {"peak": peak, "ahead": dealer.ahead, "left": dealer.outstanding}
    client = client_of(links, ahead_bytes=limit)
    client.declare("large", LARGE * 3)
    client.prepare("large")
    links.receive_object("dealer", "stalled")
    with client.program("large", "large"):
        first = shares_of(client, LARGE * 3)
    with client.program("large"):
        second = shares_of(client, LARGE * 3)
    client.finish()
    return [first, second]


BOUNDS = [(100, 1), (1_200_000, 1), (3_000_000, 2), (20_000_000, 12)]


@pytest.mark.processes
@pytest.mark.parametrize(("limit", "blocks_ahead"), BOUNDS)
def test_the_dealer_stays_within_its_bound(limit: int, blocks_ahead: int, scenarios: Outcomes) -> None:
    """Blocks of 1.2 MB: one at a time when the bound is smaller, as many as fit when it is larger, never more."""
    results = scenarios(f"bound {limit}")
    dealer = results["dealer"]
    assert dealer["ahead"] >= blocks_ahead
    assert dealer["peak"] <= max(limit, 1_200_000)
    assert dealer["peak"] > limit / 2
    assert dealer["left"] == 0
    for run in (0, 1):
        for position, request in enumerate(LARGE * 3):
            check_tuple(request, opened(results, run, position))


# -- deviations


DEVIATIONS = [
    ("other", "the computation asks for B2A of (2,) where program 'p' names square of (2,)"),
    ("larger", "the computation asks for square of (3,) where program 'p' names square of (2,)"),
    ("early", "the computation ended 1 tuples before program 'p'"),
    ("late", "the computation asks for B2A of (2,) where program 'p' names nothing more"),
]


def deviating(links: Any, how: str) -> str:
    """Both parties deviate from what they declared; every process returns the error that ends it."""
    from mpc_fl.errors import PeerLostError

    square, bit = Request("square", ((2,),)), Request("B2A", ((2,),))
    asked = {"other": [bit], "larger": [Request("square", ((3,),))], "early": [square], "late": [square, bit, bit]}
    try:
        if links.name == "dealer":
            deal_all(links)
            return "finished"
        client = client_of(links)
        client.declare("p", [square, bit])
        with client.program("p"):
            for request in asked[how]:
                client.shares(request)
    except (ProtocolError, PeerLostError) as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.processes
@pytest.mark.parametrize(("how", "named"), DEVIATIONS)
def test_a_deviation_is_found_at_every_party(how: str, named: str, scenarios: Outcomes) -> None:
    results = scenarios(f"deviation {how}")
    assert all(results[name].startswith(named) for name in WORLD)
    assert results["dealer"].startswith("lost party-")


@pytest.mark.processes
def test_programs_do_not_nest_and_are_declared_once(scenarios: Outcomes) -> None:
    results = scenarios("misuse")
    for name in WORLD:
        assert results[name] == ["inside another", "inside another", "declared already", "not declared", "1 to 65536"]


def misusing(links: Any) -> Any:
    if links.name == "dealer":
        return deal_all(links).served
    client = client_of(links)
    square = Request("square", ((2,),))
    client.declare("p", [square])
    known = ["inside another", "declared already", "not declared", "1 to 65536"]
    reasons = []

    def attempt(action: Any) -> None:
        try:
            action()
        except ProtocolError as error:
            reasons.append(next(words for words in known if words in str(error)))

    def start_inside(outer: str) -> None:
        with client.program(outer):
            client.shares(square)
            attempt(lambda: client.program("p").__enter__())

    start_inside("p")
    start_inside("followed")
    attempt(lambda: client.declare("p", [square]))
    attempt(lambda: client.prepare("q"))
    attempt(lambda: client.declare("empty", []))
    client.finish()
    return reasons


REASONS = [
    ("different requests", "different tuples"),
    ("unknown kind", "unknown message"),
    ("no kind", "unknown message"),
    ("bad request", "too large"),
    ("bad program", "has no shapes"),
    ("empty program", "1 to 65536 requests"),
    ("nameless program", "without name"),
    ("program twice", "declared twice"),
    ("other bound", "runtime.dealer_ahead_bytes"),
    ("undeclared", "was not declared"),
    ("instance that was used", "count instances differently"),
    ("instance that is not next", "count instances differently"),
    ("following undeclared", "was not declared"),
    ("too much consumed", "were not sent"),
    ("less consumed", "were not sent"),
    ("part consumed", "before its end"),
    ("other instance consumed", "no running program"),
    ("consumption of a float", "were not sent"),
]


def saying(links: Any, case: str) -> str:
    """The parties say something the protocol does not allow; the dealer's reason."""
    from mpc_fl.errors import PeerLostError

    if links.name == "dealer":
        try:
            deal_all(links)
        except ProtocolError as error:
            for name in WORLD:
                links.send_object(name, "done", {})
            return error.what
        return "finished"
    square = Request("square", ((200_000,),)).to_message()
    limit = 256 << 20
    declare = {"kind": "declare", "program": "p", "requests": [square], "more": False, "ahead_bytes": limit}
    run = {"kind": "run", "program": "p", "instance": 1, "following": ""}
    report = {"instance": 1, "blocks": 1, "complete": True}
    own = Request("square", ((WORLD.index(links.name),),)).to_message()
    control, reports = {
        "different requests": ([{"kind": "request", "instance": 1, "request": own}], []),
        "unknown kind": ([{"kind": "open"}], []),
        "no kind": ([{}], []),
        "bad request": ([{"kind": "request", "instance": 1, "request": {"kind": "square", "shapes": [[1 << 40]]}}], []),
        "bad program": ([declare | {"requests": [square, {"kind": "additive"}]}], []),
        "empty program": ([declare | {"requests": []}], []),
        "nameless program": ([declare | {"program": ["p"]}], []),
        "program twice": ([declare, declare], []),
        "other bound": ([declare | {"ahead_bytes": 1}], []),
        "undeclared": ([run], []),
        "instance that was used": ([declare, run, run], [report]),
        "instance that is not next": ([declare, run | {"instance": 2}], []),
        "following undeclared": ([declare, run | {"following": "q"}], []),
        "too much consumed": ([declare, run], [report | {"blocks": 2}]),
        "less consumed": ([declare, run], [report | {"blocks": -1}]),
        "part consumed": ([declare, run], [report | {"blocks": 0}]),
        "other instance consumed": ([declare, run], [report | {"instance": 7}]),
        "consumption of a float": ([declare, run], [report | {"blocks": 1.0}]),
    }[case]  # fmt: skip
    for message in control:
        links.send_object("dealer", "dealer control", message)
        if message.get("kind") == "run" and links.name == WORLD[-1] and reports:
            links.receive_tensor("dealer", "correction 1 0", torch.int64, (200_000,))
            links.send_object("dealer", "dealer consumed", reports.pop(0))
    try:
        links.receive_object("dealer", "done")
    except PeerLostError as error:
        return error.what
    return "told"


@pytest.mark.processes
@pytest.mark.parametrize(("case", "reason"), REASONS)
def test_the_dealer_ends_with_a_reason_when_parties_deviate(case: str, reason: str, scenarios: Outcomes) -> None:
    results = scenarios(f"said {case}")
    assert reason in results["dealer"]
    assert results[WORLD[0]] == results[WORLD[1]] == "told"


SCENARIOS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = (
    {f"bound {limit}": (bounded_program, (limit, ahead)) for limit, ahead in BOUNDS}
    | {f"deviation {how}": (deviating, (how,)) for how, _ in DEVIATIONS}
    | {f"said {case}": (saying, (case,)) for case, _ in REASONS}
    | {"misuse": (misusing, ())}
)


def play_all(own: Any, directory: str) -> dict[str, Any]:
    """All scenarios in the same three processes, each on links of its own."""
    results = {}
    names = [*WORLD, "dealer"]
    for label, (function, arguments) in SCENARIOS.items():
        if own.name == "dealer":
            ports = dict(zip(names, free_ports(len(names)), strict=True))
            for name in WORLD:
                own.send_object(name, "ports", ports)
        else:
            ports = own.receive_object("dealer", "ports")
        with local_links(own.name, names, ports, Path(directory)) as links:
            results[label] = function(links, *arguments)
    return results


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("scenarios")
    played = run_parties(play_all, [*WORLD, "dealer"], directory, str(directory))
    return lambda label: {name: results[label] for name, results in played.items()}


# -- losses


def losing(name: str, victim: str, names: list[str], ports: dict[str, int], directory: str, results: Any) -> None:
    """A program runs again and again until the victim kills itself in its middle; the others tell how they ended."""
    torch.set_num_threads(1)
    from mpc_fl.errors import PeerLostError

    try:
        with local_links(name, names, ports, Path(directory), receive_timeout=30.0) as links:
            if name == "dealer":
                deal_all(links, ahead_bytes=5_000_000)
                return
            client = client_of(links, ahead_bytes=5_000_000)
            client.declare("large", LARGE)
            for run in range(1000):
                with client.program("large", "large"):
                    for position, request in enumerate(LARGE):
                        client.shares(request)
                        if name == victim and (run, position) == (3, 1):
                            os.kill(os.getpid(), signal.SIGKILL)
                        # Parties that compute together are not far from each other.
                        other = next(peer for peer in links.peers if peer != "dealer")
                        links.send_object(other, "step", {})
                        links.receive_object(other, "step")
    except PeerLostError as error:
        results.put((name, error.cause, str(error), time.monotonic()))


@pytest.mark.processes
@pytest.mark.parametrize("victim", WORLD)
def test_a_lost_party_ends_the_dealer_with_its_name(victim: str, tmp_path: Path) -> None:
    """Killed while corrections stream: everybody else names it and ends, long before the deadline of 30 s."""
    names = [*WORLD, "dealer"]
    make_local_identities(names, {name: tmp_path / name for name in names})
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    results = SPAWN.Queue()
    arguments = [(name, victim, names, ports, str(tmp_path), results) for name in names]
    processes = {a[0]: SPAWN.Process(target=losing, args=a, name=a[0]) for a in arguments}
    try:
        for process in processes.values():
            process.start()
        ended = [results.get(timeout=60) for _ in range(2)]
        processes[victim].join(timeout=10)
        assert processes[victim].exitcode == -signal.SIGKILL
        assert {name for name, *_ in ended} == set(names) - {victim}
        for _, peer, message, _ in ended:
            assert peer == victim and victim in message
        for name in set(names) - {victim}:
            processes[name].join(timeout=20)
            assert processes[name].exitcode == 0, name
    finally:
        for process in processes.values():
            if process.is_alive():
                process.kill()
            process.join()
