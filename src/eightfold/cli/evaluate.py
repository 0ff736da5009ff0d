"""`eightfold eval`: perplexity on a text, and the distance from the float model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightfold.cli import console
from eightfold.cli.choices import AttentionMode, Backend, Dynamic, TokensAs

if TYPE_CHECKING:
    from eightfold.evaluate.evaluation import Evaluation
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to measure on. Default: essays that come with eightfold."),
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="How many chunks of the text, from its start.")] = 40,
    chunk_len: Annotated[int, typer.Option(min=2, help="Tokens in a chunk; each chunk stands alone.")] = 512,
    against: Annotated[
        Path | None, typer.Option(metavar="FLOAT_DIR", help="Also measure this model, and how far DIR is from it.")
    ] = None,
    dynamic: Annotated[
        Dynamic, typer.Option(help="How w8a8-dynamic quantizes a token; symmetric is what the NPU does.")
    ] = Dynamic.asymmetric,
    attention_mode: Annotated[
        AttentionMode | None,
        typer.Option(
            help="With int8 keys and values: a prompt attends over what the cache holds (cache), or in float, as "
            "MindIE does (mindie). Default: both are measured."
        ),
    ] = None,
    tokens_as: Annotated[
        TokensAs,
        typer.Option(
            help="Compute the text as a prompt, or as if it had been generated: w8a8-mix and mode mindie differ there."
        ),
    ] = TokensAs.prompt,
    backend: Annotated[
        Backend,
        typer.Option(help="What computes: native, reference (torch; slow), or the first that is there."),
    ] = Backend.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Measure perplexity, and with --against the KL divergence from another model.

    Example: eightfold eval Llama-3.2-1B-w8a8 --text wiki.test.txt --against Llama-3.2-1B
    """
    from eightfold.evaluate.text import cut_chunks, default_text, read_text
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.tokenizer import Tokenizer

    started = time.monotonic()
    checkpoints = [Checkpoint.open(path) for path in (model, against) if path is not None]
    content = default_text() if text is None else read_text(text)
    token_ids = Tokenizer(model).encode(content, special_tokens=False)
    pieces = cut_chunks(token_ids, chunks, chunk_len)
    if len(pieces) < chunks and text is not None:
        console.note(f"the text has {len(token_ids)} tokens: {len(pieces)} chunks of {chunk_len}, not {chunks}.")
    if chunk_len > checkpoints[0].config.max_position_embeddings:
        console.note(
            f"chunks are longer than the model's context of {checkpoints[0].config.max_position_embeddings} tokens."
        )
    backend = backend.resolve()
    measure = _evaluate_native if backend is Backend.native else _evaluate_reference
    result, ppl_mindie = measure(checkpoints, pieces, dynamic, attention_mode, tokens_as)
    _report(result, ppl_mindie, chunk_len, time.monotonic() - started, backend, as_json, against)


def _report(
    result: Evaluation,
    ppl_mindie: float | None,
    chunk_len: int,
    seconds: float,
    backend: Backend,
    as_json: bool,
    against: Path | None,
) -> None:
    if as_json:
        measured = {key: value for key, value in asdict(result).items() if value is not None}
        if ppl_mindie is not None:
            measured["ppl_mindie"] = ppl_mindie
        console.print_json({**measured, "seconds": round(seconds, 3), "backend": backend.value})
        return
    basis = f"{result.tokens} predictions, {result.chunks} chunks of {chunk_len}, {seconds:.1f} s"
    print(f"perplexity     {result.ppl:.4f}   ({basis})")
    if ppl_mindie is not None:
        print(f"mode mindie    {ppl_mindie:.4f}   (attention of a prompt in float; above: mode cache)")
    if result.ppl_against is not None and result.kl_mean is not None and result.top1_agreement is not None:
        print(f"against        {result.ppl_against:.4f}   ({against})")
        print(f"KL divergence  {result.kl_mean:.5f} mean, {result.kl_p99:.4f} at the 99th percentile (nats)")
        print(f"same top token {result.top1_agreement:.2%}")


def _evaluate_native(
    checkpoints: list[Checkpoint],
    pieces: list[list[int]],
    dynamic: Dynamic,
    attention_mode: AttentionMode | None,
    tokens_as: TokensAs,
) -> tuple[Evaluation, float | None]:
    """Measure, and return the perplexity of mode `mindie` beside where both modes are measured."""
    from eightfold.evaluate.native import evaluate
    from eightfold.model.native.load import load_model

    def load(checkpoint: Checkpoint, mode: AttentionMode) -> NativeModel:
        return load_model(checkpoint, dynamic=dynamic.mode, attention=mode.mode)

    generated, both = tokens_as is TokensAs.generated, _both_modes(checkpoints[0], attention_mode, tokens_as)
    with console.bars("evaluate", len(pieces) * (1 + both), "chunk") as task:
        models = [load(checkpoint, attention_mode or AttentionMode.cache) for checkpoint in checkpoints]
        found = evaluate(models[0], pieces, models[1] if models[1:] else None, task.advance, generated=generated)
        if not both:
            return found, None
        mindie = load(checkpoints[0], AttentionMode.mindie)
        return found, evaluate(mindie, pieces, None, task.advance).ppl


def _evaluate_reference(
    checkpoints: list[Checkpoint],
    pieces: list[list[int]],
    dynamic: Dynamic,
    attention_mode: AttentionMode | None,
    tokens_as: TokensAs,
) -> tuple[Evaluation, float | None]:
    """As _evaluate_native, in torch."""
    console.require_torch("eval --backend reference")
    from eightfold.evaluate.perplexity import evaluate
    from eightfold.model.reference.load import Decoder

    both = _both_modes(checkpoints[0], attention_mode, tokens_as)
    total = sum(checkpoint.config.num_layers for checkpoint in [*checkpoints, *checkpoints[:both]])
    with console.bars("evaluate", total + len(pieces) * (1 + both), "step") as task:
        mode = (attention_mode or AttentionMode.cache).mode
        models = [Decoder(checkpoint, dynamic.mode, mode) for checkpoint in checkpoints]
        found = evaluate(models[0], pieces, models[1] if models[1:] else None, task.advance, tokens_as.origin)
        if not both:
            return found, None
        return found, evaluate(Decoder(checkpoints[0], dynamic.mode, "mindie"), pieces, None, task.advance).ppl


def _both_modes(checkpoint: Checkpoint, attention_mode: AttentionMode | None, tokens_as: TokensAs) -> bool:
    """Return whether mode `mindie` is measured beside mode `cache`."""
    return attention_mode is None and tokens_as is TokensAs.prompt and checkpoint.has_int8_attention
