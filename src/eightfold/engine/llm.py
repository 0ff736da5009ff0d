"""The engine for programs that have all their prompts at hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.errors import InputError
from eightfold.messages import Message, read_messages
from eightfold.progress import Progress, bars, silent

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
        tokenizer = self.engine.tokenizer
        template = tokenizer.template_source()
        is_one = bool(messages) and isinstance(messages[0], dict)
        conversations = [messages] if is_one else messages
        token_ids = []
        for at, given in enumerate(conversations):
            read = read_messages(given, template, "messages" if is_one else f"messages[{at}]")
            token_ids.append(tokenizer.encode_chat(read, add_generation_prompt=True))
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
            show = partial(bars, after=QUIET_SECONDS) if progress is True else progress or silent
            with show("generate", len(requests), "answer") as task:
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
