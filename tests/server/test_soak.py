"""The soak script, for six seconds: many clients of all kinds, and every answer compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def soak(model, tmp_path, *words):
    sizes = ("--prompts", "6", "--longest-prompt", "150", "--longest-answer", "40")
    done = subprocess.run(
        [sys.executable, SOAK, model, "--clients", "16", "--idle", "8", "--minutes", "0.1", *sizes, *words,
         "--log", tmp_path / "log", "--", "--threads", "1", "--max-num-seqs", "6", "--max-waiting", "4"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_nobody_gets_a_wrong_answer_and_nothing_is_left(model, tmp_path):
    code, result = soak(model, tmp_path)
    assert (code, result["wrong"], result["what_was_wrong"]) == (0, 0, [])
    assert result["right"] > 10
    assert result["left"] > 3
    kinds = ("greedy", "chat", "sampled", "n", "logprobs", "chat logprobs", "form")
    missing = [kind for kind in kinds if not result["mixture"].get(f"right {kind}")]
    assert missing == [] and result["mixture"]["silent"] > 0
    assert not any(result["held_at_the_end"].values())
    assert result["server_exit_code"] == 0
