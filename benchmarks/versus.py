"""Time and memory of one whole quantization, against another tool's, in turn on the same machine.

    python benchmarks/versus.py --model DIR --calib FILE.jsonl --rival-name NAME \
        --rival 'python their_script.py ... {out}' [--rival-env LD_PRELOAD=...] [--runs 3]

`{out}` in the rival's command becomes a fresh directory for each run. The two run A B A B; what counts is the ratio in
each pair, because the machine's speed drifts. Time is wall time of the process, memory its largest resident size.
The table goes to stdout, the figures to benchmarks/results/versus.json.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from pathlib import Path
from statistics import median

from measure import Finished, eightfold, run, save_results


def main() -> None:
    """Measure pairs and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--rival", required=True, help="a command line; {out} is its output directory")
    parser.add_argument("--rival-name", required=True)
    parser.add_argument("--rival-env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    env = dict(setting.split("=", 1) for setting in args.rival_env)
    pairs: list[tuple[Finished, Finished]] = []
    work = Path(tempfile.mkdtemp(prefix="versus-"))
    try:
        for i in range(args.runs):
            plain = ("--scheme", "w8a8", "--anti-outlier", "none", "--calib", args.calib)
            ours = eightfold("quantize", args.model, work / f"ours-{i}", *plain)
            command = [word.replace("{out}", str(work / f"rival-{i}")) for word in shlex.split(args.rival)]
            pairs.append((ours, run(command, env)))
            ours, rival = pairs[-1]
            print(f"pair {i + 1}: {ours.seconds:.1f} s, {ours.peak_mib:.0f} MiB", end="   ")
            print(f"{args.rival_name}: {rival.seconds:.1f} s, {rival.peak_mib:.0f} MiB", flush=True)
    finally:
        shutil.rmtree(work)
    rows = []
    for what, pick in (("wall seconds", "seconds"), ("peak MiB", "peak_mib")):
        ours_all, rival_all = ([getattr(pair[side], pick) for pair in pairs] for side in (0, 1))
        ratios = [a / b for a, b in zip(ours_all, rival_all, strict=True)]
        rows.append({"what": what, "ours": median(ours_all), "rival": median(rival_all), "ratios": ratios})
        spread = f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{what:14} {median(ours_all):8.1f}   {args.rival_name} {median(rival_all):8.1f}   {spread}")
    save_results("versus", [{"rival": args.rival_name, "runs": args.runs}, *rows])


if __name__ == "__main__":
    main()
