"""`eightfold inspect`, `check`, `env` and `doctor`: what a model is, who takes it, and what this machine is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.options import as_json, model_argument
from eightfold.values import PATH, SWITCH, Kind, choice, setting, size_text

if TYPE_CHECKING:
    from eightfold.check import Report
    from eightfold.report.contents import Contents, Native
    from eightfold.report.named import NamedContents

EXIT_NOT_SERVED = EXIT_PROBLEM = 1

_NPU_LOADERS = ("mindie", "mindie-aclgraph", "vllm-ascend", "sglang")
_OTHER_LOADERS = ("vllm", "transformers")
_LOADERS = Kind((tuple,), "loaders", each=choice(*_NPU_LOADERS, *_OTHER_LOADERS, "all"))


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """Show what a model directory holds, and how this CPU would compute it. Reads no weights.

    Example: eightfold inspect Llama-3.2-1B-w8a8

    Of families that eightfold does not run, it shows what the headers and the description tell, and which engines do.

    EIGHTFOLD_ISA sets the instruction set, EIGHTFOLD_THREADS the number of threads.
    """

    model: Path = model_argument("DIR", "A quantized or float model directory.")
    as_json: bool = as_json()

    def execute(self) -> None:
        from eightfold.files import has_file, read_json
        from eightfold.format.checkpoint import Checkpoint
        from eightfold.format.description import find_description
        from eightfold.format.directory import CONFIG_NAME
        from eightfold.format.engines import elsewhere
        from eightfold.format.named import NamedDirectory
        from eightfold.report.contents import describe, describe_native
        from eightfold.report.named import describe_named

        config = self.model / CONFIG_NAME
        raw = read_json(config) if has_file(config) else {}
        if elsewhere(raw, is_quantized=bool(raw) and find_description(self.model) is not None):
            named = describe_named(NamedDirectory.open(self.model))
            if self.as_json:
                console.print_json(asdict(named))
            else:
                _print_named(named)
            return
        checkpoint = Checkpoint.open(self.model)
        contents, native = describe(checkpoint), describe_native(checkpoint)
        if self.as_json:
            console.print_json({**asdict(contents), "native": asdict(native)})
            return
        _print_contents(contents)
        print()
        _print_native(native)


def _print_contents(contents: Contents) -> None:
    size = size_text
    millions = f"{contents.parameters / 1e6:,.1f} M parameters"
    if contents.active_parameters != contents.parameters:
        millions += f" ({contents.active_parameters / 1e6:,.1f} M active)"
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


def _print_named(contents: NamedContents) -> None:
    size = size_text
    files = "1 file" if contents.files == 1 else f"{contents.files} files"
    print(contents.directory)
    family = f", {contents.family}" if contents.family else ""
    print(f"  model    {contents.architecture}{family}, {contents.num_layers} layers, {contents.dtype}")
    print(f"  scheme   {contents.scheme}")
    print(f"  size     {size(contents.nbytes)} of tensors; {size(contents.disk_bytes)} in {files}")
    print(f"  engines  {contents.engines}; eightfold does not run this family")
    print()
    rows = [(p.name, p.scheme, p.dtype, str(p.count), size(p.nbytes)) for p in contents.parts]
    for line in console.table(("part", "scheme", "stored", "count", "size"), rows, right_from=3):
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
    """Report what MindIE or another engine would do with a model directory. Reads headers and small tensors only.

    Example: eightfold check Llama-3.2-1B-w8a8 --for mindie

    Of families that MindIE's ATB models do not have, and for mindie-aclgraph and sglang, it goes by names, types and
    shapes. For vllm and transformers, which have to be named, it also judges a compressed-tensors directory.

    The exit code is 1 if one of them refuses the directory or would compute something wrong.
    """

    model: Path = model_argument("DIR", "A model directory, quantized or float.")
    loaders: tuple[str, ...] = setting(
        ("all",),
        _LOADERS,
        "Loader whose rules to apply. Default: all of NPUs, or mindie and vllm-ascend for a model that eightfold runs.",
        flag="--for",
    )
    verify: bool = setting(False, SWITCH, "Compare all files with the checksums in the journal, too.")
    as_json: bool = as_json()

    def execute(self) -> int:
        reports = self.reports()
        changed = self._changed()
        if self.as_json:
            console.print_json({**_document(reports), **({"changed_files": changed} if self.verify else {})})
        else:
            for report in reports:
                _print_report(report)
            for name in changed:
                print(f"checksums: {name} is not what it was when the model was made")
            if self.verify and not changed:
                print("checksums: every file is what it was when the model was made")
        return 0 if not changed and all(report.verdict.is_harmless for report in reports) else EXIT_NOT_SERVED

    def _changed(self) -> list[str]:
        from eightfold.format.output import verify_files

        return verify_files(self.model, console.bars) if self.verify else []

    def reports(self) -> list[Report]:
        """Return what each loader would make of the directory."""
        from eightfold.check import by_name, engines, mindie, vllm_ascend
        from eightfold.check.directory import RawDirectory
        from eightfold.config import has_engine, has_experts
        from eightfold.files import has_file, read_json
        from eightfold.format.directory import CONFIG_NAME
        from eightfold.format.named import NamedDirectory
        from eightfold.layouts import known

        config, asked = self.model / CONFIG_NAME, {*self.loaders}
        raw = read_json(config) if has_file(config) else None
        row = None if raw is None or not has_engine(raw) or has_experts(raw) else known(raw)
        is_llama = raw is None or (row is not None and "mindie" in row.engines)
        whole = {"mindie": mindie.check, "vllm-ascend": vllm_ascend.check} if is_llama else {}
        asked |= {*whole} or {*by_name.LOADERS} if "all" in asked else set()
        reports = []
        if own := [name for name in whole if name in asked]:
            directory = RawDirectory.open(self.model)
            reports += [whole[name](directory) for name in own]
        if others := [name for name in by_name.LOADERS if name in asked and name not in whole]:
            named = NamedDirectory.open(self.model)
            reports += [by_name.check(named, name) for name in others]
        if beyond := [name for name in engines.LOADERS if name in asked]:
            named = NamedDirectory.open(self.model)
            reports += [engines.check(named, name) for name in beyond]
        return reports


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
        from eightfold.machine import environment

        found = environment()
        if self.as_json:
            console.print_json(found)
            return
        packages = [f"{name} {version or '(not installed)'}" for name, version in found.pop("packages").items()]
        for key, unknown in (("memory", "unknown"), ("memory_available", "unknown"), ("memory_limit", "none")):
            nbytes = found.pop(f"{key}_bytes")
            found[key] = unknown if nbytes is None else size_text(nbytes)
        for key, value in {**found, "packages": ", ".join(packages)}.items():
            print(f"{key + ':':18}{' '.join(value) if isinstance(value, list) else value}")


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Judge this machine: what works, what would be faster, and what is missing, each with the next step.

    Example: eightfold doctor --dir /data/models

    The exit code is 1 if there is a problem. `eightfold env` shows the same facts without judgements.
    """

    directory: Path = setting(
        Path(), PATH, "Where models are going to be written. Default: here.", flag="--dir", metavar="DIR"
    )
    as_json: bool = as_json()

    def execute(self) -> int:
        from eightfold.machine import environment
        from eightfold.report.doctor import PROBLEM, examined

        facts = environment()
        found = examined(facts, self.directory)
        problems = sum(finding.verdict == PROBLEM for finding in found)
        if self.as_json:
            console.print_json({"problems": problems, "findings": [asdict(f) for f in found], "environment": facts})
        else:
            for finding in found:
                print(f"{finding.verdict:8} {finding.subject:10} {finding.text}")
                if finding.action:
                    print(f"{'':8} {'':10} -> {finding.action}")
        return EXIT_PROBLEM if problems else 0
