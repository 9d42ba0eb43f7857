"""How a round of secure aggregation grows with hospitals and with parameters, beside a plain all-reduce over the same links.

    python benchmarks/aggregation.py --hospitals 3 5 8 16 --parameters 1000000 4000000 16000000

All processes share this machine's cores, so that 16 hospitals do the work of 16: seconds per hospital are what to look at.
"""

from __future__ import annotations

import argparse
import json

from mpc_fl.apps.bench.aggregation import measure_aggregation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hospitals", type=int, nargs="+", default=[3, 5, 8, 16])
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_000_000, 4_000_000, 16_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    smallest = arguments.parameters[0]
    runs = [(count, smallest) for count in arguments.hospitals]
    runs += [(arguments.hospitals[0], parameters) for parameters in arguments.parameters[1:]]
    results = [
        measure_aggregation(count, parameters, arguments.repeats, "none", left_out)
        for left_out in (False, True)
        for count, parameters in runs
    ]
    if arguments.json:
        print(json.dumps([result.to_json() for result in results]))
        return
    print(
        "hospitals  parameters  closing masks  seconds  ms per hospital and million  of all-reduce  memory in updates"
    )
    for index, result in enumerate(results):
        masks = "yes" if index >= len(runs) else "no"
        each = 1e9 * result.seconds / result.parties / result.parameters
        print(
            f"{result.parties:9d}  {result.parameters:10,d}  {masks:>13s}  {result.seconds:7.3f}  {each:27.1f}  "
            f"{result.ratio_vs_plain_allreduce:13.2f}  {result.peak_memory_in_updates:17.2f}"
        )


if __name__ == "__main__":
    main()
