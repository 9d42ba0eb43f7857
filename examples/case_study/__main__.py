"""Run the case study and write its article: python examples/case_study --data DIR --out OUT (README.md)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

# The folder above, so that this is the package `case_study`; `examples` is a package of CrypTen's.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from case_study import films  # noqa: E402
from case_study.article import article_of  # noqa: E402
from case_study.figures import collect  # noqa: E402
from case_study.paper import write_html, write_markdown  # noqa: E402
from case_study.runner import chosen, digests, has_result, read_record, run_all  # noqa: E402
from case_study.steps import Study, plan  # noqa: E402
from mpc_fl.errors import DataError, MpcFlError  # noqa: E402
from mpc_fl.files import OTHERS_MAY_NOTHING  # noqa: E402

_MINUTES = 118.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python examples/case_study", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="DIR with {train,test}/<class>/; without it, and with --quick, phantoms"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the study; one that is there goes on")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps, and those that they need")
    parser.add_argument("--quick", action="store_true", help="few rounds and seeds, to see that it runs")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="steps that would end later are left out")
    parser.add_argument("--list", action="store_true", help="print the steps and their minutes, and run none")
    parser.add_argument("--report", action="store_true", help="run none: write the article of what there is")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write it there, with its pictures beside it"
    )
    return parser.parse_args()


def _study(arguments: argparse.Namespace) -> Study:
    out = arguments.out.resolve()
    if arguments.data is not None:
        return Study(arguments.data.resolve(), out, arguments.quick)
    if not arguments.quick:
        raise DataError("no films were given", "pass --data DIR, or --quick to try it on phantoms")
    return Study(films.write_phantoms(out / "films" / "phantoms"), out, quick=True, synthetic=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 1 where a step failed or was left out. Raises `MpcFlError` for what a user can mend."""
    study = _study(arguments)
    films.listed(study.data)
    steps = plan(study)
    wanted = chosen(steps, arguments.only)
    if arguments.list:
        for step in wanted:
            print(f"{step.name:22} {step.minutes:4g} min  {step.about}")
        print(f"{'':22} {sum(step.minutes for step in wanted):4g} min")
        return 0
    made_of = digests(study, steps)
    if not arguments.report:
        run_all(study, wanted, arguments.minutes, _say, made_of)
    records = {step.name: read_record(study, step) for step in steps}
    of_now = {step.name: has_result(records[step.name], step, made_of[step.name]) for step in steps}
    stale = [name for name, record in records.items() if record.outcome == "done" and not of_now[name]]
    for name in stale:
        _say(f"{name}: its result is of other settings or films, and counts as none; run it again")
        records.pop(name)
    found = collect(study, records)
    article = article_of(found)
    write_html(article, study.out / "report.html")
    if arguments.markdown is not None:
        write_markdown(article, arguments.markdown)
    lacking = {name: why for name, why in found.lacking.items() if name in {step.name for step in wanted}}
    for name, why in lacking.items():
        _say(f"{name} has no result: {' '.join(why.split())}")
    print(f"Article: {study.out / 'report.html'}")
    return int(bool(lacking))


def _interrupted(*_signal: object) -> NoReturn:
    raise KeyboardInterrupt  # so that the command that runs is ended, too


def main() -> None:
    """Errors are one line."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, _interrupted)
    os.umask(OTHERS_MAY_NOTHING)  # films are linked below OUT
    try:
        raise SystemExit(run(_arguments()))
    except MpcFlError as error:
        raise SystemExit(f"case study: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("case study: interrupted; the same command goes on") from None


if __name__ == "__main__":
    main()
