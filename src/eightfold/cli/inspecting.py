"""`eightfold inspect`, `check`, `env`, `eval` and `bench`: what a model and a machine are worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from eightfold.cli import console, generating
from eightfold.cli.options import as_json, model_argument, model_path
from eightfold.engine.settings import EngineConfig, leave_to_first, load_model
from eightfold.errors import InputError
from eightfold.values import PATH, SWITCH, Kind, choice, optional, setting, size_text, whole

if TYPE_CHECKING:
    from eightfold.check import Report
    from eightfold.evaluate import Evaluation
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.measure import Measurement
    from eightfold.report.contents import Contents, Native
    from eightfold.report.named import NamedContents

EXIT_NOT_SERVED = 1

_LOADERS = Kind((tuple,), "loaders", each=choice("mindie", "mindie-aclgraph", "vllm-ascend", "sglang", "all"))


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
    """Report what MindIE, vllm-ascend or SGLang would do with a model directory. Reads headers and small tensors only.

    Example: eightfold check Llama-3.2-1B-w8a8 --for mindie

    Of families that MindIE's ATB models do not have, and for mindie-aclgraph and sglang, it goes by names, types and
    shapes.

    The exit code is 1 if one of them refuses the directory or would compute something wrong.
    """

    model: Path = model_argument("DIR", "A model directory, quantized or float.")
    loaders: tuple[str, ...] = setting(
        ("all",),
        _LOADERS,
        "Loader whose rules to apply. Default: all of them, or mindie and vllm-ascend for a model that eightfold runs.",
        flag="--for",
    )
    verify: bool = setting(False, SWITCH, "Compare all files with the checksums in the journal, too.")
    as_json: bool = as_json()

    def execute(self) -> int:
        reports = self._reports()
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

    def _reports(self) -> list[Report]:
        from eightfold.check import by_name, mindie, vllm_ascend
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
        for key in ("memory_bytes", "memory_available_bytes"):
            nbytes = found.pop(key)
            found[key.removesuffix("_bytes")] = "unknown" if nbytes is None else size_text(nbytes)
        for key, value in {**found, "packages": ", ".join(packages)}.items():
            print(f"{key + ':':18}{' '.join(value) if isinstance(value, list) else value}")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure perplexity, and with --against the KL divergence from another model.

    Example: eightfold eval Llama-3.2-1B-w8a8 --text wiki.test.txt --against Llama-3.2-1B

    Without --attention-mode a model with int8 keys and values is measured in both modes.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    text: Path | None = setting(
        None,
        PATH,
        "Text to measure on, in UTF-8; of JSON, the texts of its rows. Default: essays that come with eightfold.",
        metavar="FILE",
    )
    chunks: int = setting(40, whole(1), "Number of chunks of the text, from its start.")
    chunk_len: int = setting(512, whole(2), "Tokens in a chunk; each chunk stands alone.")
    add_bos: bool | None = setting(None, optional(SWITCH), "Begin every chunk with BOS, or not. Default: not.")
    against: Path | None = setting(
        None,
        PATH,
        "Measure this model too, and the divergence of DIR from it.",
        metavar="FLOAT_DIR",
        read=model_path,
    )
    tokens_as: Literal["prompt", "generated"] = setting(
        "prompt",
        choice("prompt", "generated"),
        "Compute the text as a prompt, or as if it had been generated; this matters to w8a8-mix and to mode mindie.",
    )
    as_json: bool = as_json()
    computing: dict[str, Any] = generating.engine("dynamic", "attention_mode")
    backend: str = generating.backend()

    def execute(self) -> None:
        from eightfold.evaluate import cut_chunks, default_text, read_evaluation_text
        from eightfold.quant.dataset import enough_for
        from eightfold.tokenizer import Tokenizer

        started = time.monotonic()
        checkpoints = [console.opened(path) for path in (self.model, self.against) if path is not None]
        content = default_text() if self.text is None else read_evaluation_text(self.text)
        tokenizer = Tokenizer(self.model, add_bos=bool(self.add_bos))
        content = enough_for(self.chunks * self.chunk_len, content)
        token_ids = tokenizer.encode(content, special_tokens=False)
        for checkpoint in checkpoints:
            if (highest := max([*tokenizer.bos, *token_ids], default=0)) >= (size := checkpoint.config.vocab_size):
                raise InputError(
                    "text",
                    where=self.text or "this package",
                    got=f"token id {highest}",
                    expected=f"0 to {size - 1}, which {checkpoint.directory} knows",
                    action="The tokenizer of DIR has a token that a model lacks.",
                )
        length = self.chunk_len - len(tokenizer.bos)
        pieces = [[*tokenizer.bos, *piece] for piece in cut_chunks(token_ids, self.chunks, length)]
        if len(pieces) < self.chunks and self.text is not None:
            found = f"{len(pieces)} chunks of {self.chunk_len}, not {self.chunks}"
            console.note(f"the text has {len(token_ids)} tokens: {found}.")
        if self.chunk_len > (context := checkpoints[0].config.reach):
            console.note(f"chunks are longer than the model's context of {context} tokens.")
        backend = generating.resolve_backend(self.backend)
        result, ppl_mindie = self._measure(checkpoints, pieces, backend)
        self._report(result, ppl_mindie, time.monotonic() - started, backend)

    def _report(self, result: Evaluation, ppl_mindie: float | None, seconds: float, backend: str) -> None:
        if self.as_json:
            measured = {key: value for key, value in asdict(result).items() if value is not None}
            if ppl_mindie is not None:
                measured["ppl_mindie"] = ppl_mindie
            console.print_json({**measured, "seconds": round(seconds, 3), "backend": backend})
            return
        basis = f"{result.tokens} predictions, {result.chunks} chunks of {self.chunk_len}, {seconds:.1f} s"
        print(f"perplexity     {result.ppl:.4f}   ({basis})")
        if ppl_mindie is not None:
            print(f"mode mindie    {ppl_mindie:.4f}   (attention of a prompt in float; above: mode cache)")
        if result.ppl_against is not None and result.kl_mean is not None and result.top1_agreement is not None:
            print(f"against        {result.ppl_against:.4f}   ({self.against})")
            print(f"KL divergence  {result.kl_mean:.5f} mean, {result.kl_p99:.4f} at the 99th percentile (nats)")
            print(f"same top token {result.top1_agreement:.2%}")

    def _measure(
        self, checkpoints: list[Checkpoint], pieces: list[list[int]], backend: str
    ) -> tuple[Evaluation, float | None]:
        """Return the figures, and the perplexity of mode `mindie` beside where both modes are measured."""
        is_open = "attention_mode" not in self.computing and self.tokens_as == "prompt"
        both = is_open and checkpoints[0].has_int8_attention
        steps, unit = len(pieces) * (1 + both), "chunk"
        if backend == "reference":
            console.require_torch("eval --backend reference")
            steps += sum(checkpoint.config.num_layers for checkpoint in [*checkpoints, *checkpoints[:both]])
            unit = "step"
        load, evaluate = self._reference() if backend == "reference" else self._native()
        with console.bars("evaluate", steps, unit) as task:
            config = EngineConfig(**self.computing)
            model, *others = [load(checkpoint, config) for checkpoint in checkpoints]
            found = evaluate(model, pieces, others[0] if others else None, task.advance)
            if not both:
                return found, None
            mindie = load(checkpoints[0], replace(config, attention_mode="mindie"))
            return found, evaluate(mindie, pieces, None, task.advance).ppl

    def _native(self) -> tuple[Callable[..., Any], Callable[..., Evaluation]]:
        from eightfold.evaluate import evaluate_native
        from eightfold.model.native.load import load_model

        load = lambda checkpoint, config: load_model(checkpoint, **{**config.computing, "longest": self.chunk_len})  # noqa: E731
        return load, partial(evaluate_native, generated=self.tokens_as == "generated")

    def _reference(self) -> tuple[Callable[..., Any], Callable[..., Evaluation]]:
        from eightfold.evaluate import evaluate_reference
        from eightfold.model.reference.load import Decoder

        load = lambda checkpoint, config: Decoder(  # noqa: E731
            checkpoint, config.dynamic, config.attention_mode, self.chunk_len
        )
        return load, partial(evaluate_reference, origin=self.tokens_as)


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Measure how fast a model runs here, and the limits of this machine.

    Example: eightfold bench Llama-3.2-1B-w8a8 --batch 8

    Prompts are random and new in each repetition; nothing is reused, and no stop token ends an answer. The figures
    shown are medians.

    prefill_tok_s: prompt tokens / time until every sequence has its first new token.

    decode_tok_s: new tokens after the first ones / time from the first to the last.

    output_tok_s: all new tokens / all time, prompts included.

    bytes_per_token: bytes that one decode step reads, whatever its batch: every
    weight byte of the linears and the head once, and every sequence's keys
    and values at its mean context, which is prompt + new / 2. The embedding's
    row is not counted. A float head counts by its int8 copy, without the few
    rows that decide which token is the likeliest.

    read_gb_s: bytes_per_token x decode steps a second.

    measured_bandwidth_gb_s: bandwidth when all threads read 1 GiB, the best of
    3 passes, measured in turn with the repetitions.

    bandwidth_fraction: read_gb_s / measured_bandwidth_gb_s.

    measured_int8_tops: rate when all threads multiply and add bytes in registers
    with the widest dot product of this CPU, two operations for each product;
    the best of 3 passes, measured in turn with the repetitions.

    int8_fraction: 2 x int8 weights in the layers x prefill_tok_s /
    measured_int8_tops. W8A16 takes two passes, so it reaches at most 0.5. Float
    layers and attention are not counted, though they take time.

    load_s: time from opening the directory until the model can run.

    peak_rss_mib: largest resident size of the process after one repetition,
    mapped weights included.

    With several processes (torchrun --nproc_per_node N -m eightfold bench ...),
    bytes and rates are those of all together, and threads and peak_rss_mib are
    those of the first; resident_weights_mib tells by how much loading has made
    each larger. The first process measures the limits, with the threads of all
    processes of its host, and multiplies them by the number of hosts.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    prompt_len: int = setting(512, whole(1), "Number of random tokens in a prompt.")
    new_tokens: int = setting(128, whole(2), "Number of new tokens; nothing ends an answer earlier.")
    batch: int = setting(1, whole(1), "Number of sequences at a time.")
    repeat: int = setting(5, whole(1), "Number of repetitions after one to warm up.")
    as_json: bool = as_json()
    computing: dict[str, Any] = generating.engine("threads", "dynamic", "attention_mode", "expert_parallel")

    def execute(self) -> None:
        from eightfold.model.native import measure

        config = EngineConfig(**self.computing)
        leave_to_first(self.model, config)
        started = time.perf_counter()
        checkpoint = console.opened(self.model)
        work = measure.Workload(self.prompt_len, self.new_tokens, self.batch)
        work.require_context(checkpoint.config)
        native = load_model(checkpoint, config)
        load_s = time.perf_counter() - started
        runner = measure.Runner(native, work)
        with console.bars("bench", 1 + self.repeat, "run") as task:
            found = measure.measure(runner, self.repeat, task.advance)
        result = {**measure.summary(found, checkpoint, native, work), "load_s": load_s}
        if self.as_json:
            console.print_json({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()})
            return
        scheme = checkpoint.description.model_quant_type if checkpoint.description else "FLOAT"
        print("\n".join(_lines(f"{self.model}: {scheme}", result, found)))


def _lines(title: str, result: dict[str, Any], found: Measurement) -> list[str]:
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    if result["world_size"] > 1:
        threads = f"{result['world_size']} processes of {threads}"
    memory = "" if result["peak_rss_mib"] is None else f", peak memory {result['peak_rss_mib']:.0f} MiB"
    sequences = "1 sequence" if result["batch"] == 1 else f"{result['batch']} sequences"
    load = f"loaded in {result['load_s']:.2f} s{memory}"
    step = f"{size_text(result['bytes_per_token'])} a step, {result['read_gb_s']:.1f} GB/s"
    decode = f"{result['bandwidth_fraction']:.0%} of the reading limit ({step})"
    return [
        f"{title}, {result['isa']}, {threads}; {load}",
        f"{sequences}, {result['prompt_len']} tokens in, {result['new_tokens']} out; "
        f"median of {result['repeat']} (least to most)",
        "",
        _row("limits   reading", found.of("read_gb_s"), "GB/s", 1),
        _row("         int8 products", found.of("int8_tops"), "TOPS", 2),
        _row(
            "reached  prefill", found.of("prefill_tok_s"), "tok/s", 1, f"{result['int8_fraction']:.0%} of int8 products"
        ),
        _row("         decode", found.of("decode_tok_s"), "tok/s", 1, decode),
        _row("         output", found.of("output_tok_s"), "tok/s", 1, "prompts included"),
    ]


def _row(title: str, values: list[float], unit: str, digits: int, note: str = "") -> str:
    spread = f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    return f"{title:24}{median(values):10.{digits}f} {unit:6} {spread:22} {note}".rstrip()
