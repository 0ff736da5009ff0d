"""`eightfold run`: one prompt, one answer; or a file of prompts, and a file of answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightfold.cli import console, sampling
from eightfold.cli.choices import AttentionMode, Backend, Dynamic
from eightfold.cli.serving import parse_size
from eightfold.cli.single_run import Single
from eightfold.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from eightfold.cli.batch_run import Batch, Tally
    from eightfold.engine.settings import EngineConfig

EXIT_FAILED = 1


def run(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    prompt: Annotated[str | None, typer.Option(help="What to continue, or with --chat what to say.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to answer, many at a time: a JSON object a line, or .txt."),
    ] = None,
    output_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Where their answers go, as JSON.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin the output file anew, and do not go on with it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    chat_template: sampling.ChatTemplate = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    seed: sampling.Seed = None,
    stop: sampling.Stop = None,
    ignore_eos: sampling.IgnoreEos = False,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Answers to compute at a time. Default: 64.")
    ] = None,
    max_model_len: sampling.MaxModelLen = None,
    kv_memory: sampling.KvMemory = None,
    speculate: sampling.Speculate = 0,
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
    backend: Annotated[
        Backend, typer.Option(help="What computes: native, reference (torch; slow), or the first that is there.")
    ] = Backend.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many threads compute. Default: one a CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Answer one prompt and show the text as it comes, or all prompts of a file.

    Example: eightfold run Llama-3.2-1B-w8a8 --chat --prompt "What's deep learning?"

    Answers are greedy unless --temperature is given.

    In several processes: torchrun --nproc_per_node 2 -m eightfold run DIR ...

    A file: eightfold run DIR --input-file prompts.jsonl --output-file answers.jsonl

    Its lines are objects with prompt, messages or prompt_token_ids, perhaps an
    id, and perhaps parameters of their own: max_tokens, temperature, top_p,
    seed, stop, logprobs, n and so on. Each answer is written as soon as it is
    there, with the index of its prompt and its id, so not in the prompts'
    order. A run that was stopped goes on when it is started again: what is
    answered is not done twice, what failed is tried again, and an input that
    has changed since is refused. Exit code 1: some prompts could not be
    answered, which their lines tell under error.
    """
    chosen = sampling.given(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, seed=seed, stop=stop,
        ignore_eos=ignore_eos,
    )  # fmt: skip
    limits = sampling.given(
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, kv_memory=kv_memory, speculate=speculate or None
    )
    _require_one_source(prompt, input_file, output_file, {**limits, **sampling.given(overwrite=overwrite)})
    template = None if chat_template is None else sampling.read_template(chat_template)
    backend = backend.resolve()
    _leave_to_first(model, backend, threads=threads, dynamic=dynamic.mode, attention=attention_mode.mode)
    if note := sampling.idle_note(chosen):
        console.note(note)
    settings = {"threads": threads, "dynamic": dynamic.mode, "attention_mode": attention_mode.mode, **limits}
    if prompt is not None:
        single = Single(model, prompt, chat, template, max_new_tokens, chosen, settings, backend, measures=as_json)
        _one(single, as_json)
        return
    assert input_file is not None
    assert output_file is not None
    _require_native(backend)
    from eightfold.cli.batch_run import Batch

    chosen["max_tokens"] = max_new_tokens
    config = _config(settings)
    _batch(Batch(model, input_file, output_file, overwrite, chat, template, chosen, config), as_json)


def _require_one_source(
    prompt: str | None, input_file: Path | None, output_file: Path | None, of_files: dict[str, Any]
) -> None:
    if (prompt is None) == (input_file is None):
        got = "none" if prompt is None else "--input-file too"
        raise ConfigError("--prompt", got=got, expected="it or --input-file")
    if input_file is not None and output_file is None:
        raise ConfigError("--output-file", got="none", expected="where the answers to --input-file go")
    alone = [*(["output_file"] if output_file is not None else []), *of_files]
    if prompt is not None and alone:
        raise ConfigError(f"--{alone[0].replace('_', '-')}", got="--prompt", expected="--input-file beside it")


def _leave_to_first(model: Path, backend: Backend, **options: Any) -> None:
    """Go on in one process only; the others compute for it. Where nothing is shared, refuse more than one.

    Raises:
        UnsupportedError: there are several, and the backend is for one.
    """
    if backend is not Backend.reference:
        from eightfold.engine.loading import leave_to_first

        leave_to_first(model, **options)
        return
    from eightfold.parallel.world import World

    if (size := World.of_environment().size) > 1:
        raise UnsupportedError("the reference backend", got=f"{size} processes", expected="one")


def _require_native(backend: Backend) -> None:
    if backend is Backend.reference:
        raise UnsupportedError("--input-file", got="the reference backend", expected="the native one")


def _config(settings: dict[str, Any]) -> EngineConfig:
    from eightfold.engine.settings import EngineConfig

    if "kv_memory" in settings:
        settings["kv_memory"] = parse_size(settings["kv_memory"])
    sequences = settings.get("max_num_seqs", EngineConfig.max_num_seqs)
    return EngineConfig(**settings, max_batched_tokens=max(EngineConfig.max_batched_tokens, 2 * sequences))


def _batch(batch: Batch, as_json: bool) -> None:
    """Answer a file of prompts."""
    from eightfold.cli.batch_run import run_batch

    tally = run_batch(batch)
    _report(tally, batch.output_file, as_json)
    if tally.failed:
        raise typer.Exit(EXIT_FAILED)


def _report(tally: Tally, output_file: Path, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "answered": tally.answered,
                "answered_before": tally.answered_before,
                "failed": tally.failed,
                "prompt_tokens": tally.prompt_tokens,
                "generated_tokens": tally.generated_tokens,
                "seconds": round(tally.seconds, 3),
                "world_size": tally.world_size,
                "resident_weights_mib": tally.resident_weights_mib,
            }
        )
    else:
        tokens = f"{tally.prompt_tokens} + {tally.generated_tokens} tokens"
        speed = f"{tally.seconds:.1f} s, {tally.speed:.1f} tok/s"
        print(f"[{tally.answered} answers, {tokens}, {speed}]", file=sys.stderr)
    if tally.failed:
        total = tally.answered + tally.answered_before + tally.failed
        print(f"eightfold: {tally.failed} of {total} prompts have an error in {output_file}.", file=sys.stderr)


def _one(single: Single, as_json: bool) -> None:
    """Answer one prompt."""
    found = single.answer(None if as_json else _show)
    if as_json:
        console.print_json(found._asdict())
        return
    print()
    counts = f"{found.prompt_tokens} + {len(found.token_ids)} tokens"
    print(f"[{counts}, {found.seconds:.1f} s, {found.finish_reason}]", file=sys.stderr)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
