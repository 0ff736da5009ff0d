"""One reader in a process of its own: gives it inputs, and keeps what happens in a file.

The file is a JSON object that is written again every second, so that what a killed process did is known too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz import mutate

SECONDS, BYTES = 10, 2**30
MOST = 2**18  # bytes of an input


def _peak_bytes() -> int:
    """Return the most memory that this process has had resident; quickly, as it is asked for around each input."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Run:
    """Inputs given to one reader.

    Attributes:
        state: how many there were and what happened.
    """

    def __init__(self, name: str, out: Path) -> None:
        from tests.fuzz.targets import TARGETS

        self.out = out
        self.target = TARGETS[name]
        self.seeds = self.target.seeds(out / "work")
        self.read = self.target.make(out / "work")
        with contextlib.suppress(*self.target.refusals):
            self.read(self.seeds[0])  # loads what the reader imports, which is not the time of an input
        self.state: dict[str, Any] = {"inputs": 0, "read": 0, "slowest": 0.0, "peak": 0, "crashes": []}
        self._seen: set[str] = set()
        self.written = 0.0
        self._before, self._grown = _peak_bytes(), 0

    def one(self, data: bytes) -> None:
        """Give one input to the reader."""
        state, started, peak = self.state, time.perf_counter(), _peak_bytes()
        state["inputs"] += 1
        try:
            self.read(data)
            state["read"] += 1
        except self.target.refusals as error:
            if len(str(error)) > 2000 or "\n" in str(error):
                self._crash(data, f"a message of {len(str(error))} characters: {str(error)[:200]!r}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            stack = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in stack if "/tests/fuzz/" not in frame.filename]
            at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the target"
            self._crash(data, f"{type(error).__name__} at {at}: {str(error)[:200]}")
        self._grown += (
            _peak_bytes() - peak
        )  # what else the process takes is not the reader's, such as a corpus of inputs
        seconds = time.perf_counter() - started
        if seconds > state["slowest"]:
            state["slowest"] = seconds
            (self.out / "slowest").write_bytes(data)
        if seconds > SECONDS:
            self._crash(data, f"takes {seconds:.0f} s")
        if time.monotonic() - self.written > 0.5:
            self.write()

    def _crash(self, data: bytes, what: str) -> None:
        kind = what.partition(": ")[0]
        if kind not in self._seen and len(self._seen) < 50:
            self._seen.add(kind)
            path = self.out / f"crash-{len(self._seen)}"
            path.write_bytes(data)
            self.state["crashes"].append([what, str(path)])
            self.write()

    def write(self) -> None:
        """Write down what happened so far."""
        self.written = time.monotonic()
        faulthandler.dump_traceback_later(40)  # tells in the log where it hangs
        self.state["peak"] = self._before + self._grown
        if self._grown > BYTES and "memory" not in self._seen:
            self._seen.add("memory")
            self.state["crashes"].append([f"memory: {self._grown >> 20} MiB", ""])
        (self.out / "state.new").write_text(json.dumps(self.state))
        (self.out / "state.new").replace(self.out / "state")


def with_atheris(run: Run, seconds: float, runs: int, seed: int) -> None:
    """Let libFuzzer choose inputs; ends the process."""
    import atheris

    def custom(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        # Most of what reaches new branches is damaged; seeds lead behind the first checks.
        chosen = rng.choice(run.seeds) if rng.random() < 0.5 else data
        return mutate.mutate(chosen, rng, most, lambda data: bytes(atheris.Mutate(data, most)))

    corpus = run.out / "corpus"
    corpus.mkdir()
    for at, each in enumerate(run.seeds):
        (corpus / str(at)).write_bytes(each)
    options = [f"-runs={runs}"] if runs else [f"-max_total_time={max(int(seconds), 1)}"]
    options += [f"-seed={seed + 1}", f"-max_len={MOST}", "-len_control=0", "-detect_leaks=0"]
    options += ["-timeout=30", "-rss_limit_mb=2048", f"-artifact_prefix={run.out}/ended-", str(corpus)]
    ends = time.monotonic() + seconds

    def one(data: bytes) -> None:
        run.one(data)
        # libFuzzer leaves by _exit, so the last state has to be written in time.
        last_second = not runs and time.monotonic() > ends - 1.5 and time.monotonic() - run.written > 0.05
        if last_second or run.state["inputs"] >= runs > 0:
            run.write()

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=custom)
    atheris.Fuzz()


def without_atheris(run: Run, seconds: float, runs: int, seed: int) -> None:
    """Mutate the seeds."""
    rng, ends = random.Random(seed), time.monotonic() + seconds
    while run.state["inputs"] < runs if runs else time.monotonic() < ends:
        data = rng.choice(run.seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = mutate.mutate(data, rng, MOST, lambda data: mutate.mutate_bytes(data, rng))
        run.one(data)


def main() -> None:
    """Run one reader, as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--replay", type=Path)
    args = parser.parse_args()
    guided = not (args.blind or args.replay)
    if guided:
        try:
            import atheris

            with atheris.instrument_imports(include=["eightfold"], enable_loader_override=False):
                import tests.fuzz.targets  # noqa: F401
        except ImportError:
            guided = False
    (args.out / "work").mkdir(parents=True, exist_ok=True)
    run = Run(args.target, args.out)
    if args.replay:
        run.one(args.replay.read_bytes())
    else:
        for seed in run.seeds:
            run.one(seed)
        run.state["seeds_read"] = run.state["read"]
        (with_atheris if guided else without_atheris)(run, args.seconds, args.runs, args.seed)
    run.write()
    os._exit(0)


if __name__ == "__main__":
    main()
