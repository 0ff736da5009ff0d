"""Regular expressions that come with a model, tried on names in a process of their own, as one may never end.

A repetition inside a repetition, such as (a+)+$, can be matched in a number of ways that doubles with each letter, and
`re` tries them all. So the processor time and the memory of whoever tries are limited, whatever the expression is.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Sequence

SECONDS = 5  # of processor time, for all; those of models in use take milliseconds
_MEMORY = 512 << 20


class PatternError(ValueError):
    """An expression that cannot be tried. `pattern` is it, the text says why."""

    def __init__(self, pattern: str, why: str) -> None:
        super().__init__(why)
        self.pattern = pattern


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return names -> the first pattern that matches from their beginning; a name that none matches is left out.

    Raises:
        PatternError: one is no regular expression, or has used up the limits.
    """
    if not patterns:
        return {}
    import subprocess  # most models need none

    # Python isolated: whatever lies in the current folder, which may be a model's, is not imported.
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__, str(SECONDS)],
        input=json.dumps({"patterns": list(patterns), "names": list(names)}).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
    for pattern, answer in zip(patterns, answers, strict=False):
        if isinstance(answer, str):
            raise PatternError(pattern, answer)
    if len(answers) < len(patterns):
        raise PatternError(patterns[len(answers)], f"more than {SECONDS} s on {len(names)} names")
    return {names[i]: pattern for pattern, hits in zip(patterns, answers, strict=True) for i in hits}


# What follows runs in the other process.


def _hits(pattern: str, names: dict[int, str]) -> list[int] | str:
    try:
        match = re.compile(pattern).match
        return [i for i, name in names.items() if match(name)]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return str(error) or type(error).__name__


def _main(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    given = json.loads(sys.stdin.buffer.read())
    left = dict(enumerate(given["names"]))
    for pattern in given["patterns"]:
        hits = _hits(pattern, left)
        print(json.dumps(hits), flush=True)
        for i in hits if isinstance(hits, list) else ():
            del left[i]


if __name__ == "__main__":
    _main(int(sys.argv[1]))
