"""`eightfold check`: whether a loader on the NPU host would take a directory."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightfold.cli import console

if TYPE_CHECKING:
    from eightfold.check.findings import Report

EXIT_NOT_SERVED = 1


class Loader(str, Enum):
    """Whose rules to apply."""

    mindie = "mindie"
    vllm_ascend = "vllm-ascend"
    all = "all"


def check(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, quantized or float.")],
    loaders: Annotated[
        list[Loader] | None,
        typer.Option("--for", metavar="LOADER", help="mindie, vllm-ascend or all (default); may be given twice."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Say what MindIE or vllm-ascend would do with a model directory. Reads headers and small tensors only.

    Exit code 1 if one of them refuses the directory or would compute something wrong.

    Example: eightfold check Llama-3.2-1B-w8a8 --for mindie
    """
    reports = _reports(model, loaders or [Loader.all])
    if as_json:
        console.print_json(_document(reports))
    else:
        for report in reports:
            _print_report(report)
    if not all(report.verdict.is_harmless for report in reports):
        raise typer.Exit(EXIT_NOT_SERVED)


def _reports(model: Path, loaders: list[Loader]) -> list[Report]:
    from eightfold.check import mindie, vllm_ascend
    from eightfold.check.directory import RawDirectory

    directory = RawDirectory.open(model)
    checks = {Loader.mindie: mindie.check, Loader.vllm_ascend: vllm_ascend.check}
    return [run(directory) for loader, run in checks.items() if loader in loaders or Loader.all in loaders]


def _document(reports: list[Report]) -> dict[str, Any]:
    """Return a single report as it is; several below the worst verdict of all."""
    if len(reports) == 1:
        return reports[0].as_dict()
    worst = max((report.verdict for report in reports), key=lambda verdict: verdict.severity)
    return {
        "directory": reports[0].directory,
        "verdict": worst.value,
        "loads": all(report.loads for report in reports),
        "reports": [report.as_dict() for report in reports],
    }


def _print_report(report: Report) -> None:
    print(f"{report.loader}: {report.verdict.value} {report.directory}")
    names = [finding.rule.removeprefix(f"{report.loader}.") for finding in report.findings]
    width = max(map(len, names), default=0)
    previous = ""
    for name, finding in zip(names, report.findings, strict=True):
        verdict = finding.verdict.value
        print(f"  {'' if verdict == previous else verdict:10}  {name:{width}}  {finding.message}")
        print(f"  {'':10}  {'':{width}}  in {finding.place}")
        previous = verdict
    print(f"  {'runs':10}  {report.summary.text if report.loads else 'nothing'}")
