"""`eightfold bench`: how fast a model runs here, and how much of the machine that is."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightfold.cli import console
from eightfold.cli.choices import AttentionMode, Dynamic

if TYPE_CHECKING:
    from eightfold.model.native.measure import Measurement


def bench(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    prompt_len: Annotated[int, typer.Option(min=1, help="Random tokens in a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to answer with, whatever they are.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="How many compute. Default: EIGHTFOLD_THREADS, or one for each usable CPU."),
    ] = None,
    dynamic: Annotated[
        Dynamic, typer.Option(help="How w8a8-dynamic quantizes a token; symmetric is what the NPU does.")
    ] = Dynamic.asymmetric,
    attention_mode: Annotated[
        AttentionMode,
        typer.Option(
            help="With int8 keys and values: a prompt attends over what the cache holds (cache), or in float, as "
            "MindIE does (mindie)."
        ),
    ] = AttentionMode.cache,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions after one to warm up; medians count.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Measure how fast a model runs here, beside what this machine could do at most.

    Fresh random prompts each time; nothing is reused, no stop token ends it.
    Shown are medians. Example: eightfold bench Llama-3.2-1B-w8a8 --batch 8

    prefill_tok_s: prompt tokens / time until every sequence has its first.

    decode_tok_s: tokens after the first ones / time from first to last.

    output_tok_s: all new tokens / all time, prompts included.

    bytes_per_token: what one decode step reads, whatever its batch: every
    weight byte of the linears and the head once (the embedding's row is not
    counted; of a float head its int8 copy, and not the few rows that settle
    which token is the likeliest), and every sequence's keys and values at
    its mean context, which is prompt + new / 2.

    read_gb_s: bytes_per_token x decode steps a second.

    measured_bandwidth_gb_s: all threads read 1 GiB, the best of 3 passes;
    measured in turn with the repetitions.

    bandwidth_fraction: read_gb_s / measured_bandwidth_gb_s.

    measured_int8_tops: all threads multiply and add bytes in registers with
    the widest dot product of this CPU, two operations for each product; the
    best of 3 passes, in turn with the repetitions.

    int8_fraction: 2 x int8 weights in the layers x prefill_tok_s, of
    measured_int8_tops. W8A16 takes two passes, so 0.5 is its most. Float
    layers and attention count for nothing, though they take time.

    load_s: from opening the directory to a model that can run.

    peak_rss_mib: largest resident size of the process after one repetition,
    mapped weights included.

    Of several processes (torchrun --nproc_per_node N -m eightfold bench ...)
    bytes and rates are those of all together, threads and peak_rss_mib those
    of the first; resident_weights_mib is by how much loading has made each
    larger. The limits are measured by the first with the threads of all on
    its host, times the number of hosts.
    """
    from eightfold.engine.loading import leave_to_first, load_model
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native import measure

    options: dict[str, Any] = {"threads": threads, "dynamic": dynamic.mode, "attention": attention_mode.mode}
    leave_to_first(model, **options)
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model)
    work = measure.Workload(prompt_len, new_tokens, batch)
    work.require_context(checkpoint.config)
    native = load_model(checkpoint, **options)
    load_s = time.perf_counter() - started
    runner = measure.Runner(native, work)
    with console.bars("bench", 1 + repeat, "run") as task:
        found = measure.measure(runner, repeat, task.advance)
    result = {**measure.summary(found, checkpoint, native, work), "load_s": load_s}
    if as_json:
        console.print_json({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()})
        return
    scheme = checkpoint.description.model_quant_type if checkpoint.description else "FLOAT"
    for line in _lines(f"{model}: {scheme}", result, found):
        print(line)


def _lines(title: str, result: dict[str, Any], found: Measurement) -> list[str]:
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    if result["world_size"] > 1:
        threads = f"{result['world_size']} processes of {threads}"
    memory = "" if result["peak_rss_mib"] is None else f", peak memory {result['peak_rss_mib']:.0f} MiB"
    sequences = "1 sequence" if result["batch"] == 1 else f"{result['batch']} sequences"
    load = f"loaded in {result['load_s']:.2f} s{memory}"
    step = f"{console.size_text(result['bytes_per_token'])} a step, {result['read_gb_s']:.1f} GB/s"
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
