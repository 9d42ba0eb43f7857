"""One injection from its start to its verdict: a run of the product, a strike, and all that has to hold afterwards."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from tests.soak import judging, results
from tests.soak.plan import (
    ASKING,
    HOSPITALS,
    KILL,
    LAUNCHER,
    STOP,
    STOP_AND_CONT,
    VARIANTS,
    Injection,
)
from tests.soak.processes import Command, left_after, send

TO_START = 90.0  # until a party or a service is there, on a busy machine
UNDISTURBED = 180.0
_ORPHANS = 20.0  # seconds: who is left when the launcher was killed ends itself
_OTHERS = 3.0
_SETTLE = 5.0


@dataclass
class Usual:
    """Of a kind of run that nobody disturbs: its seconds, those that each party lives, and what it left."""

    seconds: float
    lives: dict[str, float]
    out: Path


@dataclass
class Verdict:
    """What came of an injection. `struck`: whether there was anybody to strike; `bad`: complaints; `where`: the victim's last
    line of its log before the strike."""

    injection: Injection
    struck: bool = False
    where: str = ""
    code: int | None = None
    line: str = ""
    seconds: float | None = None
    followed: str = ""
    bad: list[str] = field(default_factory=list)


def configuration_file(directory: Path, variant: str) -> Path:
    """Written for a run of this kind."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(VARIANTS[variant].settings))
    return path


def measure(directory: Path, variant: str, model: Path) -> Usual:
    """A run that nobody disturbs; what it leaves is in `directory`/run. Raises `RuntimeError` when it does not succeed."""
    kind = VARIANTS[variant]
    began, lives = time.monotonic(), dict[str, list[float]]()

    def watch(command: Command, prefix: str = "") -> None:
        while command.process.poll() is None:
            for name in kind.victims:
                if name not in (LAUNCHER, ASKING) and command.party(name) is not None:
                    lives.setdefault(name, [time.monotonic()] * 2)[1] = time.monotonic()
            time.sleep(0.02)

    if kind.task == "serve":
        serve, asking = _serve(directory, model), None
        observer = threading.Thread(target=watch, args=(serve,))
        observer.start()
        if _serves(serve):
            asked = time.monotonic()
            asking = _ask(directory, HOSPITALS[0], "ask").ended(UNDISTURBED)
            lives[ASKING] = [asked, time.monotonic()]
        serve.process.terminate()
        observer.join()
        succeeded = asking is not None and asking.code == 0
    else:
        command = _command(directory, variant, model)
        watch(command)
        ended = command.ended(1.0)
        succeeded = ended is not None and ended.code == 0
    if not succeeded:
        raise RuntimeError(f"an undisturbed run ({variant}) failed: see {directory}")
    seconds = time.monotonic() - began
    lives_of = {LAUNCHER: seconds, **{name: end - start for name, (start, end) in lives.items()}}
    return Usual(seconds, lives_of, directory / "run")


def inject(injection: Injection, directory: Path, model: Path, usual: Usual) -> Verdict:
    """Do it in `directory`, which is empty and keeps everything."""
    verdict = Verdict(injection)
    if VARIANTS[injection.variant].task == "serve":
        _inject_into_service(verdict, directory, model, usual)
    else:
        _inject_into_run(verdict, directory, model, usual)
    logs = {str(path.relative_to(directory)): path.read_text(errors="replace")
            for pattern in ("*.log", "*.stderr") for path in directory.rglob(pattern)}  # fmt: skip
    verdict.bad += judging.judge_logs(logs)
    return verdict


# ---- commands ----------------------------------------------------------------------------------------------------------


def _command(directory: Path, variant: str, model: Path) -> Command:
    task, config = VARIANTS[variant].task, configuration_file(directory, variant)
    arguments = [task, str(config), "--out", str(directory / "run")]
    return Command(directory, task, arguments + (["--model", str(model)] if task == "infer" else []))


def _serve(directory: Path, model: Path, name: str = "serve") -> Command:
    config = configuration_file(directory, "serve")
    return Command(directory, name, ["serve", str(config), "--model", str(model), "--out", str(directory / "service")])


def _serves(serve: Command) -> bool:
    """Wait until a service is there; False when it ended before."""
    deadline = time.monotonic() + TO_START
    while "Ask with: " not in serve.printed.read_text():
        if serve.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _ask(directory: Path, hospital: str, name: str) -> Command:
    service = directory / "service"
    identity = service / "parties" / hospital / "identity"
    return Command(
        directory,
        name,
        ["infer", str(service / "federation.yaml"), "--identity", str(identity), "--out", str(directory / name)],
    )


# ---- striking ----------------------------------------------------------------------------------------------------------


def _strike(verdict: Verdict, command: Command, usual: Usual) -> None:
    """Wait for the victim and the moment, and send what the injection says."""
    injection = verdict.injection
    if injection.victim in (LAUNCHER, ASKING):
        victim: psutil.Process | None = psutil.Process(command.process.pid)
    else:
        victim = command.await_party(injection.victim, TO_START)
    if victim is None:
        return
    time.sleep(injection.moment * usual.lives[injection.victim])
    verdict.where = _last_words(command.said.parent, injection.victim)
    first = signal.SIGSTOP if injection.signal in (STOP, STOP_AND_CONT) else getattr(signal, f"SIG{injection.signal}")
    verdict.struck = send(victim, first)
    if injection.signal == STOP_AND_CONT and verdict.struck:
        time.sleep(injection.pause)
        send(victim, signal.SIGCONT)


def _last_words(directory: Path, name: str) -> str:
    logs = [path for path in directory.rglob("*.log") if path.stem == name]
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()]
    return lines[-1] if lines else ""


def _end(verdict: Verdict, command: Command, usual: Usual) -> judging.Ended | None:
    """How the command ended that was struck, within the time that is allowed; who is left after it is ended and told."""
    injection, allowed = verdict.injection, judging.seconds_allowed(verdict.injection, usual.seconds)
    ended = command.ended(allowed)
    orphaned = injection.victim == LAUNCHER and injection.signal == KILL
    if ended is None:
        verdict.bad.append(f"it had not ended {allowed:.0f} s after the strike")
    else:
        verdict.code, verdict.seconds = ended.code, ended.seconds
        verdict.line = " | ".join(ended.lines)
        verdict.bad += judging.judge_command(injection, ended)
    left = left_after(command.said.parent, _ORPHANS if orphaned else _OTHERS)
    verdict.bad += [f"still there: {who}" for who in left]
    return ended


# ---- a run ---------------------------------------------------------------------------------------------------------------


def _inject_into_run(verdict: Verdict, directory: Path, model: Path, usual: Usual) -> None:
    injection, out = verdict.injection, directory / "run"
    kind = VARIANTS[injection.variant]
    command = _command(directory, injection.variant, model)
    _strike(verdict, command, usual)
    ended = _end(verdict, command, usual)
    if ended is None:
        return
    if ended.code == 0 or (ended.code < 0 and out.exists()):  # killed when all was done but the telling
        verdict.bad += _judge_results(injection, directory, usual)
        return
    if ended.code > 0:
        verdict.bad += results.failed_badly(out)
    if kind.task == "train":
        _resume(verdict, directory, usual)


def _judge_results(injection: Injection, directory: Path, usual: Usual) -> list[str]:
    out = directory / "run"
    if VARIANTS[injection.variant].task == "infer":
        return results.diagnosis_incomplete(out)
    if found := results.training_incomplete(out):
        return found
    lost = results.lost_hospitals(out)
    found = judging.judge_lost(injection, lost) + _verify(directory)
    if VARIANTS[injection.variant].same_model and not lost:
        found += results.another_model(out, usual.out)
    return found


def _verify(directory: Path) -> list[str]:
    verified = Command(directory, "verify", ["ledger", "verify", str(directory / "run")]).ended(60.0)
    return [] if verified is not None and verified.code == 0 else [f"the ledger does not verify: {verified}"]


def _resume(verdict: Verdict, directory: Path, usual: Usual) -> None:
    """Go on with a training run that failed; one that has completed no round is refused in one line."""
    out, can = directory / "run", results.resumable(directory / "run")
    arguments = ["train", str(directory / "config.yaml"), "--out", str(out), "--resume"]
    ended = Command(directory, "resume", arguments).ended(UNDISTURBED)
    if ended is None:
        verdict.bad.append("--resume did not end")
    elif can:
        verdict.followed = "resumed"
        if ended.code:
            verdict.bad.append(f"--resume: exit code {ended.code}: {' | '.join(ended.lines)}")
        else:
            verdict.bad += [f"after --resume: {what}" for what in _judge_results(verdict.injection, directory, usual)]
    else:
        verdict.followed = "nothing to resume"
        verdict.bad += judging.one_line(ended) if ended.code else ["--resume went on with nothing"]
    verdict.bad += [f"still there after --resume: {who}" for who in left_after(directory, _OTHERS)]


# ---- a service ---------------------------------------------------------------------------------------------------------


def _inject_into_service(verdict: Verdict, directory: Path, model: Path, usual: Usual) -> None:
    injection = verdict.injection
    serve, asking = _serve(directory, model), None
    striker = threading.Thread(target=_strike, args=(verdict, serve, usual))
    if injection.victim != ASKING:
        striker.start()
    if _serves(serve):
        asking = _ask(directory, HOSPITALS[0], "ask")
        if injection.victim == ASKING:
            _strike(verdict, asking, usual)
    if injection.victim != ASKING:
        striker.join()
    if asking is not None:
        _judge_asking(verdict, asking, directory, usual)
    if _stays(injection, serve):
        verdict.followed = "served on"
        verdict.bad += _ask_again(directory)
        verdict.bad += _stop_service(serve, directory)
        return
    ended = _end(verdict, serve, usual)
    if ended is not None and ended.code == 0:
        verdict.bad.append("the service ended with exit code 0")
    again = _serve(directory, model, "serve-again")
    verdict.followed = "served again"
    if _serves(again):
        verdict.bad += _ask_again(directory)
        verdict.bad += _stop_service(again, directory)
    else:
        verdict.bad.append(f"the service does not start again: {again.said.read_text()}")
        left_after(directory, 0.0)


def _judge_asking(verdict: Verdict, asking: Command, directory: Path, usual: Usual) -> None:
    injection, allowed = verdict.injection, judging.seconds_allowed(verdict.injection, usual.seconds)
    if injection.victim == ASKING and injection.signal == STOP and verdict.struck:
        log = directory / "service" / "logs" / "model-owner.log"
        named = _within(allowed, lambda: "hospital-0 has given no sign of life" in log.read_text(errors="replace"))
        verdict.bad += [] if named else ["the model owner does not name the hospital that was stopped"]
        asking.process.kill()
        asking.process.wait()
        return
    ended = asking.ended(allowed + 30.0)  # one that comes when all is over waits for links
    if ended is None:
        verdict.bad.append("the hospital that asks does not end")
        asking.process.kill()
        asking.process.wait()
        return
    if injection.victim == ASKING:
        verdict.code, verdict.seconds, verdict.line = ended.code, ended.seconds, " | ".join(ended.lines)
    verdict.bad += judging.judge_asking(injection, ended)
    out = directory / "ask"
    if ended.code == 0 or (ended.code < 0 and out.exists()):
        verdict.bad += results.diagnosis_incomplete(out)
    elif ended.code > 0:
        verdict.bad += results.failed_badly(out)


def _stays(injection: Injection, serve: Command) -> bool:
    """Whether the service is there after all; one that lost a half ends soon."""
    if injection.victim == ASKING or judging.must_complete(injection):
        return serve.process.poll() is None
    return injection.signal == STOP_AND_CONT and not _within(_SETTLE, lambda: serve.process.poll() is not None)


def _within(seconds: float, found: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def _ask_again(directory: Path) -> list[str]:
    ended = _ask(directory, HOSPITALS[1], "ask-again").ended(UNDISTURBED)
    if ended is None or ended.code:
        return [f"the next hospital that asks gets no answer: {ended}"]
    return results.diagnosis_incomplete(directory / "ask-again", HOSPITALS[1])


def _stop_service(serve: Command, directory: Path) -> list[str]:
    serve.process.terminate()
    ended = serve.ended(judging.TO_END)
    left = [f"still there: {who}" for who in left_after(directory, _OTHERS)]
    if ended is None or ended.code != 128 + signal.SIGTERM or ended.lines != [judging.INTERRUPTED]:
        return [f"the service did not stop as told: {ended}", *left]
    return left
