"""What `quantize` tells of what it has made: lines, a JSON document, a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.errors import ConfigError
from eightfold.values import size_text

if TYPE_CHECKING:
    from eightfold.config import ModelConfig
    from eightfold.format.stored import StoredTensors
    from eightfold.quant.analysis import Analysis
    from eightfold.quant.outcome import Outcome


def require_place_of_report(path: Path, out: Path, *, is_plan: bool) -> None:
    """Refuse a page that could not be written, or would be in the way of the next --overwrite.

    Raises:
        ConfigError: nothing is made that it could show, or it would be inside `out`.
        OutputError: its folder is not there, or it is one.
    """
    from eightfold.report.page import require_place

    if is_plan:
        raise ConfigError("report", got="it together with `plan`", expected="one of them")
    if out.resolve() in path.resolve().parents:
        expected = "a file elsewhere: OUT holds the model alone"
        raise ConfigError("report", got=f"{path}, which is inside OUT", expected=expected)
    require_place(path, "report")


def write_losses(path: Path, analysis: Analysis, source: Path, outcome: Outcome) -> None:
    """Write the page of a model that keeps a limit of the loss: what each linear loses, and what was chosen."""
    from eightfold.cli.analyzing import with_texts
    from eightfold.report import analysis_page
    from eightfold.report.page import write_page

    smoothing = outcome.smoothing.choices if outcome.smoothing is not None else None
    write_page(path, analysis_page.render(with_texts(analysis, source), smoothing, tuple(outcome.notes)))


def write_decisions(
    path: Path, outcome: Outcome, stored: StoredTensors, config: ModelConfig | None, source: Path, out: Path
) -> None:
    """Write the page of any other model: the type of each linear, with the reason, and what was seen on the way."""
    from eightfold.report.page import write_page
    from eightfold.report.quantize_page import render

    write_page(path, render(outcome, stored.tensors, source.resolve().name, out, config))


def document(outcome: Outcome, seconds: float, peaks: list[int | None]) -> dict[str, Any]:
    """Return what --json prints; `peaks` are bytes of each process."""
    resident = [None if peak is None else round(peak / 2**20, 1) for peak in peaks]
    return {
        "layers": outcome.layers,
        "layers_resumed": outcome.layers_resumed,
        "already_complete": outcome.already_complete,
        "seconds": round(seconds, 3),
        "peak_rss_mib": resident[0],
        "world_size": len(resident),
        "ranks_peak_rss_mib": resident,
        "scheme": outcome.recipe.scheme.value,
        "quantized": outcome.quantized,
        "types": outcome.counts,
        "nbytes": outcome.nbytes,
        "restarted": outcome.restarted or None,
        "notes": outcome.notes,
    }


def tell_outcome(outcome: Outcome) -> None:
    """Tell what was decided on the way."""
    if outcome.smoothing is not None:
        proof = outcome.smoothing
        print(
            f"outlier suppression {outcome.recipe.anti_outlier.value if outcome.recipe.anti_outlier else ''}: "
            f"{len(proof.choices)} groups; the float model's logits move by {proof.max_logit_difference:.2g} at most "
            f"(largest {proof.max_logit:.3g})"
        )
    if outcome.rolled_back:
        rows = [
            [row.module, f"{row.range_param:.2f}", "shares the input of one above" if row.of_group else "widest inputs"]
            for row in sorted(outcome.rolled_back, key=lambda row: -row.range_param)
        ]
        print("\n".join(console.table(("kept float", "range / std", "why"), rows, right_from=99)))
    if outcome.restarted:
        console.note(f"what an earlier run had finished was damaged ({outcome.restarted}): all was made anew.")
    elif outcome.layers_resumed:
        console.note(f"{outcome.layers_resumed} layers were finished by an earlier run.")


def summary(outcome: Outcome) -> str:
    """Return what was made, in a line."""
    counts = outcome.counts
    first, *others = [kind for kind in counts if kind != "FLOAT"] or [outcome.recipe.scheme.value]
    parts = [f"{counts.get(first, 0)} linears as {first}", *(f"{counts[kind]} as {kind}" for kind in others)]
    parts += [f"{len(outcome.kept_float)} kept float"] if outcome.kept_float else []
    return f"{', '.join(parts)}, {size_text(outcome.nbytes)}"
