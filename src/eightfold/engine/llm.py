"""The engine for programs that have all their prompts at hand."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.errors import InputError
from eightfold.progress import Progress, SilentTask, Task
from eightfold.tokenizer import Message

Prompt = str | Sequence[int]

# Work that is done in less is not worth a bar.
QUIET_SECONDS = 2.0


class LLM:
    """A model that answers lists of prompts.

    Args:
        directory: a quantized or float model directory.
        limits: the fields of EngineConfig.

    Raises:
        EightfoldError: the directory, the limits or the machine are not as they must be.

    Example:
        LLM("Llama-3.2-1B-w8a8").generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].outputs[0].text
    """

    def __init__(self, directory: str | Path, **limits: Any) -> None:
        self.engine = Engine.load(Path(directory), EngineConfig(**limits))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts.

        Args:
            prompts: texts or lists of token ids; or just one.
            params: one SamplingParams for all prompts, or one for each; None for the defaults.
            progress: who is told of every finished answer; True for a bar on a terminal's stderr after two seconds.

        Returns:
            One output for each prompt, in order, finished.

        Raises:
            CapacityError: a prompt is too long; nothing was computed.
            InputError: prompts and params do not fit together, or a prompt makes no sense.
        """
        encode = self.engine.tokenizer.encode
        token_ids = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in _list_of(prompts)]
        return self._run(token_ids, _one_each(params, len(token_ids)), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template: lists of messages, or just one.

        Raises:
            CheckpointError: the model has no chat template.
            CapacityError, InputError: as `generate`.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self.engine.tokenizer
        token_ids = [tokenizer.encode_chat(each, add_generation_prompt=True) for each in conversations]  # type: ignore[arg-type]
        return self._run(token_ids, _one_each(params, len(token_ids)), progress)

    def _run(
        self, prompts: Sequence[Sequence[int]], params: list[SamplingParams], progress: Progress | bool
    ) -> list[RequestOutput]:
        pairs = zip(prompts, params, strict=True)
        # All are checked before the first is begun.
        requests = [self.engine.prepare(f"llm-{next(self._ids)}", ids, each, streams=False) for ids, each in pairs]
        for request in requests:
            self.engine.submit(request)
        found: dict[str, RequestOutput] = {}
        try:
            with _opened(progress, len(requests)) as task:
                while self.engine.has_unfinished:
                    for output in self.engine.step():
                        found[output.request_id] = output
                        task.advance()
        finally:  # nothing is left behind by an interrupt
            for request in requests:
                self.engine.abort(request.request_id)
        return [found[request.request_id] for request in requests]


def _list_of(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError("params", got=f"{len(params)} of them", expected=f"one, or one for each of {count} prompts")
    return list(params)


@contextmanager
def _opened(progress: Progress | bool, total: int) -> Iterator[Task]:
    if progress is False or (progress is True and not sys.stderr.isatty()):
        yield SilentTask()
        return
    with _late_bar("generate", total, "answer") if progress is True else progress("generate", total, "answer") as task:
        yield task


@contextmanager
def _late_bar(title: str, total: int, unit: str) -> Iterator[Task]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(f"{unit}s"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task_id = bar.add_task(title, total=total)

    class BarTask(SilentTask):
        """A task of one bar."""

        def advance(self) -> None:
            """Move the bar."""
            bar.advance(task_id)

    timer = threading.Timer(QUIET_SECONDS, bar.start)
    timer.start()
    try:
        yield BarTask()
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
