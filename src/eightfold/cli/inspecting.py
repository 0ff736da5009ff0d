"""`eightfold inspect`, `check` and `env`: what is in a directory, who would take it, and what this machine is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.options import argument, as_json
from eightfold.values import Kind, choice, setting

if TYPE_CHECKING:
    from eightfold.check import Report
    from eightfold.report.contents import Contents
    from eightfold.report.native import Native

EXIT_NOT_SERVED = 1

_LOADERS = Kind((tuple,), "loaders", each=choice("mindie", "vllm-ascend", "all"))


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """Show what a model directory holds, and how this CPU would compute it. Reads no weights.

    Example: eightfold inspect Llama-3.2-1B-w8a8

    EIGHTFOLD_ISA sets the instruction set, EIGHTFOLD_THREADS the number of threads.
    """

    model: Path = argument("DIR", "A quantized or float model directory.")
    as_json: bool = as_json()

    def execute(self) -> None:
        """Print it."""
        from eightfold.format.checkpoint import Checkpoint
        from eightfold.report.contents import describe
        from eightfold.report.native import describe_native

        checkpoint = Checkpoint.open(self.model)
        contents, native = describe(checkpoint), describe_native(checkpoint)
        if self.as_json:
            console.print_json({**asdict(contents), "native": asdict(native)})
            return
        _print_contents(contents)
        print()
        _print_native(native)


def _print_contents(contents: Contents) -> None:
    size = console.size_text
    millions = f"{contents.parameters / 1e6:,.1f} M parameters"
    share = f"{contents.nbytes / contents.float_bytes:.0%} of the {contents.dtype} model"
    files = "1 file" if contents.files == 1 else f"{contents.files} files"
    print(contents.directory)
    print(f"  model   {contents.architecture}, {contents.num_layers} layers, {millions}, {contents.dtype}")
    print(f"  scheme  {contents.scheme}")
    print(f"  size    {size(contents.nbytes)} of tensors, {share}; {size(contents.disk_bytes)} in {files}")
    for text in contents.notes:
        print(f"  note    {text}")
    print()
    header = ("module", "layers", "scheme", "weight", "shape", "count", "size")
    rows = [
        (p.name, p.layers, p.scheme, p.dtype, "x".join(map(str, p.shape)), str(p.count), size(p.nbytes))
        for p in contents.parts
    ]
    for line in console.table(header, rows, right_from=4):
        print(f"  {line}")


def _print_native(native: Native) -> None:
    if native.problem:
        print(f"  cpu      {native.problem}")
        return
    others = [isa for isa in native.available_isas if isa != native.isa]
    also = f"; EIGHTFOLD_ISA also takes {' or '.join(others)}" if others else ""
    print(f"  cpu      {native.isa}, {native.isa_reason}{also}")
    print(f"  threads  {native.threads}, {native.threads_reason}")
    print()
    header = ("computed", "scheme", "stored", "count", "by")
    rows = [(k.modules, k.scheme, k.dtype, str(k.count), k.how) for k in native.kernels]
    for line in console.table(header, rows, right_from=len(header)):
        print(f"  {line}")


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Report what MindIE or vllm-ascend would do with a model directory. Reads headers and small tensors only.

    Example: eightfold check Llama-3.2-1B-w8a8 --for mindie

    The exit code is 1 if one of them refuses the directory or would compute something wrong.
    """

    model: Path = argument("DIR", "A model directory, quantized or float.")
    loaders: tuple[str, ...] = setting(("all",), _LOADERS, "Loader whose rules to apply. Default: all.", flag="--for")
    as_json: bool = as_json()

    def execute(self) -> int:
        """Print each loader's report; return 1 if one would not serve the directory."""
        reports = self._reports()
        if self.as_json:
            console.print_json(_document(reports))
        else:
            for report in reports:
                _print_report(report)
        return 0 if all(report.verdict.is_harmless for report in reports) else EXIT_NOT_SERVED

    def _reports(self) -> list[Report]:
        from eightfold.check import mindie, vllm_ascend
        from eightfold.check.directory import RawDirectory

        directory = RawDirectory.open(self.model)
        checks = {"mindie": mindie.check, "vllm-ascend": vllm_ascend.check}
        return [check(directory) for name, check in checks.items() if {name, "all"} & {*self.loaders}]


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


@dataclass(frozen=True, kw_only=True)
class EnvCommand:
    """Show versions, processor, instruction sets, threads and memory, for a bug report."""

    as_json: bool = as_json()

    def execute(self) -> None:
        """Print them."""
        from eightfold.report.environment import environment

        found = environment()
        if self.as_json:
            console.print_json(found)
            return
        packages = [f"{name} {version or '(not installed)'}" for name, version in found.pop("packages").items()]
        for key in ("memory_bytes", "memory_available_bytes"):
            nbytes = found.pop(key)
            found[key.removesuffix("_bytes")] = "unknown" if nbytes is None else console.size_text(nbytes)
        for key, value in {**found, "packages": ", ".join(packages)}.items():
            print(f"{key + ':':18}{' '.join(value) if isinstance(value, list) else value}")
