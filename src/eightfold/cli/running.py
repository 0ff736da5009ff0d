"""`eightfold run`: one prompt, one answer."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from eightfold.cli import console
from eightfold.cli.choices import AttentionMode, Backend, Dynamic

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint


def run(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    prompt: Annotated[str, typer.Option(help="What to continue, or with --chat what to say.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
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
    """Answer one prompt, greedily, and show the text as it comes.

    Example: eightfold run Llama-3.2-1B-w8a8 --chat --prompt "What's deep learning?"
    """
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.tokenizer import StreamDecoder, Tokenizer, stop_token_ids

    checkpoint = Checkpoint.open(model)
    tokenizer = Tokenizer(model)
    if chat:
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        prompt_ids = tokenizer.encode(prompt)
    stream = StreamDecoder(tokenizer)

    def show(token: int) -> None:
        if not as_json:
            sys.stdout.write(stream.push(token))
            sys.stdout.flush()

    backend = backend.resolve()
    if backend is Backend.reference:
        answer = _reference(checkpoint, dynamic, attention_mode)
    else:
        answer = _native(checkpoint, dynamic, attention_mode, threads)
    started = time.monotonic()
    result = answer(prompt_ids, max_new_tokens, stop_token_ids(model, checkpoint.config_raw), show)
    seconds = time.monotonic() - started
    if as_json:
        console.print_json(
            {
                "text": tokenizer.decode(result.token_ids),
                "token_ids": result.token_ids,
                "prompt_tokens": len(prompt_ids),
                "finish_reason": result.finish_reason,
                "seconds": round(seconds, 3),
                "backend": backend.value,
            }
        )
        return
    print(stream.finish())
    count = len(result.token_ids)
    print(f"[{len(prompt_ids)} + {count} tokens, {seconds:.1f} s, {result.finish_reason}]", file=sys.stderr)


class _Generation(Protocol):
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"]: ...


# Prompt, new tokens at most, stop tokens, and who is told of each token.
_Answer = Callable[[Sequence[int], int, frozenset[int], Callable[[int], None]], _Generation]


def _reference(checkpoint: Checkpoint, dynamic: Dynamic, attention_mode: AttentionMode) -> _Answer:
    console.require_torch("run --backend reference")
    from eightfold.reference.generate import generate
    from eightfold.reference.load import Decoder

    return functools.partial(generate, Decoder(checkpoint, dynamic.mode, attention_mode.mode))


def _native(checkpoint: Checkpoint, dynamic: Dynamic, attention_mode: AttentionMode, threads: int | None) -> _Answer:
    from eightfold.native.generate import generate
    from eightfold.native.load import load_model

    return functools.partial(
        generate, load_model(checkpoint, threads=threads, dynamic=dynamic.mode, attention=attention_mode.mode)
    )
