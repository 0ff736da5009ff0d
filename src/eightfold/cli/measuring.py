"""`eightfold eval` and `bench`: how good a model is, and how fast it runs here."""

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
from eightfold.errors import CapacityError, InputError
from eightfold.values import PATH, SWITCH, choice, optional, setting, size_text, whole

if TYPE_CHECKING:
    from eightfold.evaluate import Evaluation, Positions
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.measure import Measurement, Workload
    from eightfold.model.native.model import NativeModel
    from eightfold.tokenizer import Tokenizer

GAIN_PROMPT = 96  # tokens of a text that a draft model's gain is measured on


def _html(shows: str) -> Any:
    return setting(None, PATH, f"Write a page (HTML), too: {shows}.", metavar="FILE")


def _require_place(page: Path | None) -> None:
    """Refuse a page that could not be written before anything is measured."""
    if page is not None:
        from eightfold.report.page import require_place

        require_place(page, "html")


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
    html: Path | None = _html("how the figures spread, by place and by size, and the worst tokens")
    as_json: bool = as_json()
    computing: dict[str, Any] = generating.engine("dynamic", "attention_mode")
    backend: str = generating.backend()

    def execute(self) -> None:
        from eightfold.evaluate import Positions, cut_chunks, default_text, read_evaluation_text
        from eightfold.quant.dataset import enough_for
        from eightfold.tokenizer import Tokenizer

        started = time.monotonic()
        _require_place(self.html)
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
        positions = Positions()
        result, ppl_mindie = self._measure(checkpoints, pieces, backend, positions)
        if self.html is not None:
            self._write_page(self.html, result, positions, pieces, tokenizer, ppl_mindie)
        self._report(result, ppl_mindie, time.monotonic() - started, backend)

    def _write_page(
        self,
        path: Path,
        result: Evaluation,
        positions: Positions,
        pieces: list[list[int]],
        tokenizer: Tokenizer,
        ppl_mindie: float | None,
    ) -> None:
        from eightfold.report.evaluation_page import Measured, render
        from eightfold.report.page import write_page

        against = None if self.against is None else self.against.resolve().name
        text = "the text of the package" if self.text is None else self.text.name
        model = self.model.resolve().name
        decode = partial(tokenizer.decode, keep_special=True)
        write_page(path, render(Measured(result, positions, pieces, decode, model, against, text, ppl_mindie)))

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
        self, checkpoints: list[Checkpoint], pieces: list[list[int]], backend: str, positions: Positions
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
            found = evaluate(model, pieces, others[0] if others else None, task.advance, positions=positions)
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

    With --draft-model the beginnings of texts that come with eightfold, code and
    prose, are continued too, --batch of them at a time, without guesses and with
    them in turn. draft_tok_s, plain_tok_s: tokens a second from the first new
    token on; draft_ratio: the median of their ratios. identical: whether both
    gave the same tokens.
    """

    model: Path = model_argument("DIR", generating.MODEL)
    prompt_len: int = setting(512, whole(1), "Number of random tokens in a prompt.")
    new_tokens: int = setting(128, whole(2), "Number of new tokens; nothing ends an answer earlier.")
    batch: int = setting(1, whole(1), "Number of sequences at a time.")
    repeat: int = setting(5, whole(1), "Number of repetitions after one to warm up.")
    html: Path | None = _html("what was reached beside the limits, each repetition, and the bytes of a step")
    as_json: bool = as_json()
    draft_model: Path | None = generating.draft_model()
    computing: dict[str, Any] = generating.engine(
        "draft_tokens", "threads", "dynamic", "attention_mode", "expert_parallel"
    )

    def execute(self) -> None:
        from eightfold.model.native import measure

        config = EngineConfig(**self.computing, draft_model=self.draft_model)
        _require_place(self.html)
        leave_to_first(self.model, config)
        started = time.perf_counter()
        checkpoint = console.opened(self.model)
        work = measure.Workload(self.prompt_len, self.new_tokens, self.batch)
        work.require_context(checkpoint.config)
        guesses = None if config.draft_model is None else _Guesses(checkpoint, config, work)
        native = load_model(checkpoint, config)
        load_s = time.perf_counter() - started
        runner = measure.Runner(native, work)
        with console.bars("bench", 1 + self.repeat, "run") as task:
            found = measure.measure(runner, self.repeat, task.advance)
        result = {**measure.summary(found, checkpoint, native, work), "load_s": load_s}
        gains = {} if guesses is None else guesses.gains(native, self.repeat)
        if gains:
            result["draft"] = {kind: _rounded(gain) for kind, gain in gains.items()}
        scheme = checkpoint.description.model_quant_type if checkpoint.description else "FLOAT"
        if self.html is not None:
            from eightfold.report.bench_page import render
            from eightfold.report.page import write_page

            write_page(self.html, render(result, found, self.model.resolve().name, scheme))
        if self.as_json:
            console.print_json(_rounded(result))
            return
        print("\n".join(_lines(f"{self.model}: {scheme}", result, found)))
        for kind, gain in gains.items():
            print(_gain_line(kind, gain))


class _Guesses:
    """What a draft model saves with code and with prose. All is checked before anything is loaded.

    Args:
        checkpoint: of the large model.
        config: names the draft model.
        work: how many sequences, and how many new tokens of each.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, work: Workload) -> None:
        from eightfold.engine.draft import open_draft
        from eightfold.quant.dataset import rows_by_kind
        from eightfold.tokenizer import Tokenizer

        self._tokenizer, self._new_tokens = Tokenizer(checkpoint.directory), work.new_tokens
        self._load, self._notes = open_draft(checkpoint, self._tokenizer, config)
        texts = rows_by_kind().items()
        self._prompts = {kind: [self._tokenizer.encode(text)[:GAIN_PROMPT] for text in each] for kind, each in texts}
        longest = max(len(prompt) for each in self._prompts.values() for prompt in each) + work.new_tokens
        if longest > (context := checkpoint.config.context):
            raise CapacityError(
                "--draft-model",
                got=f"texts of {longest} tokens with their {work.new_tokens} new ones",
                expected=f"at most {context}, the model's context",
                action="Lower --new-tokens.",
            )
        tokens = max(config.max_batched_tokens, 2 * work.batch)
        self._config = replace(
            config, max_num_seqs=work.batch, max_model_len=longest, max_batched_tokens=tokens, prefix_caching=False
        )

    def gains(self, native: NativeModel, repeat: int) -> dict[str, dict[str, Any]]:
        """Return medians and counts of each kind.

        Args:
            native: the large model.
            repeat: how often all is done.
        """
        from eightfold.engine.engine import Engine
        from eightfold.engine.gain import measure_gain

        for note in self._notes:
            console.note(note)
        engine = Engine(native, self._tokenizer, self._config, draft=self._load())
        with console.bars("guesses", len(self._prompts) * repeat, "run") as task:
            found = measure_gain(engine, self._prompts, self._new_tokens, repeat, task.advance)
        return {kind: gain.summary() for kind, gain in found.items()}


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


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _gain_line(kind: str, gain: dict[str, Any]) -> str:
    right = f"{gain['model_accepted']} of {gain['model_drafted']} guesses right"
    facts = f"{right}, {gain['tokens_per_pass']:.2f} tokens a pass"
    ratio = f"{gain['draft_ratio']:.2f} x {gain['plain_tok_s']:.1f} without"
    differs = "" if gain["identical"] else "; ANSWERS DIFFER"
    return f"{f'guesses  {kind}':24}{gain['draft_tok_s']:10.1f} tok/s  {ratio}; {facts}{differs}"


def _row(title: str, values: list[float], unit: str, digits: int, note: str = "") -> str:
    spread = f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    return f"{title:24}{median(values):10.{digits}f} {unit:6} {spread:22} {note}".rstrip()
