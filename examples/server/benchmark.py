"""What ATB_LLM_BENCHMARK_ENABLE=1 reports: one row of times, as a CSV file and as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from examples.server.generate import Timing

DEFAULT_FILE = Path("benchmark_result/benchmark.csv")
FILE_MODE = 0o640


def enabled() -> bool:
    """Return whether the environment asks for a report."""
    return os.environ.get("ATB_LLM_BENCHMARK_ENABLE", "0") == "1"


def report_file() -> Path:
    """Return where the report goes."""
    return Path(os.environ.get("ATB_LLM_BENCHMARK_FILEPATH") or DEFAULT_FILE)


def decode_token_ms(timing: Timing, max_new_tokens: int) -> float:
    """Return the milliseconds of one decode step, as the original counts them: the first token is the prefill's."""
    return 1000 * sum(timing.decode) / (max_new_tokens - 1) if max_new_tokens > 1 else 0.0


def row(batch_size: int, input_len: int, max_new_tokens: int, e2e_seconds: float, timing: Timing) -> dict[str, str]:
    """Return the report, column by column in the order of the file.

    Args:
        batch_size: of decoding.
        input_len: tokens of the first prompt.
        max_new_tokens: of each answer.
        e2e_seconds: of all requests together.
        timing: of the single steps.
    """
    prefill_ms, count = 1000 * sum(timing.prefill), len(timing.prefill)
    return {
        "batch_size": str(batch_size),
        "input_seq_len": str(input_len),
        "output_seq_len": str(max_new_tokens),
        "e2e_time(ms)": f"{1000 * e2e_seconds: .2f}",
        "prefill_time(ms)": f"{prefill_ms: .2f}",
        "decoder_token_time(ms)": f"{decode_token_ms(timing, max_new_tokens): .2f}",
        "prefill_count": str(count),
        "prefill_token_times": _joined(timing.prefill),
        "decode_token_times": _joined(timing.decode),
        "prefill_average_time(ms)": f"{prefill_ms / max(count, 1): .2f}",
    }


def summary(columns: dict[str, str]) -> str:
    """Return the report's times in one line."""
    names = {
        "Prefill time": "prefill_time(ms)",
        "Prefill average time": "prefill_average_time(ms)",
        "Decode token time": "decoder_token_time(ms)",
        "E2E time": "e2e_time(ms)",
    }
    return ", ".join(f"{title}:{columns[name]}ms" for title, name in names.items())


def markdown(columns: dict[str, str]) -> str:
    """Return the report as a table of one row."""
    cells = [value.strip() for value in columns.values()]
    widths = [max(len(name), len(cell)) for name, cell in zip(columns, cells, strict=True)]
    lines = [
        [name.ljust(width) for name, width in zip(columns, widths, strict=True)],
        ["-" * width for width in widths],
        [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, columns: dict[str, str]) -> None:
    """Write the report as a header and one row, readable by owner and group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    with os.fdopen(descriptor, "w", newline="") as file:
        os.fchmod(descriptor, FILE_MODE)  # whatever the umask, and the file that was there
        csv.writer(file, lineterminator="\n").writerows((list(columns), list(columns.values())))


def _joined(seconds: Sequence[float]) -> str:
    return ",".join(f"{value:.6f}" for value in seconds)
