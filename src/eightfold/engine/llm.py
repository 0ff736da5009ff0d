"""The engine for programs that have all their prompts at hand."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from eightfold.engine.conversation import Conversation
from eightfold.engine.engine import Engine
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.prompts import Prompt, PromptLike, read_prompts
from eightfold.engine.reasoning import Thinking
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.engine.vllm_arguments import read_arguments, require_neutral, unknown
from eightfold.errors import InputError
from eightfold.hub.fetch import local_model
from eightfold.messages import Message, is_continued, read_messages
from eightfold.progress import Progress, bars, silent
from eightfold.tokenizer import Tokenizer
from eightfold.values import OBJECT, SWITCH, TEXT, Kind, optional, shown, whole

# Work that is done in less is not worth a bar.
QUIET_SECONDS = 2.0

_TOOLS = optional(Kind((list, tuple), "a list of tools", each=OBJECT))
_SEED = optional(whole(-(2**63), 2**64 - 1))

# vLLM's arguments of generate and chat that ask for what is not done.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_token_ids": ((), "Give them as prompts."),
    "lora_request": ((), "Merge the adapter into the model before it is quantized."),
    "priority": ((), "Prompts are answered in their order."),
    "chat_template_content_format": (("auto",), "The template says it."),
    "mm_processor_kwargs": (({},), "Only text is read."),
    "tokenization_kwargs": (({},), "Give token ids."),
}


class LLM:
    """A model that answers lists of prompts.

    Its methods may be called from several threads: calls follow one another. Prompts in one list are computed together.

    Args:
        model: a quantized or float model directory, or the ORG/NAME[@REVISION] of a hub, which is fetched.
        tokenizer: a directory with another tokenizer than the model's.
        seed: of the answers whose SamplingParams have none: of the nth prompt since the start, n is added.
        arguments: the fields of EngineConfig, also by vLLM's names. Those of vLLM's that change no answer, such as
            gpu_memory_utilization, are left out with a warning.

    Raises:
        EightfoldError: the directory, the arguments or the machine are not as they must be.

    Example:
        LLM("Llama-3.2-1B-w8a8").generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].outputs[0].text
    """

    def __init__(
        self, model: str | Path, *, tokenizer: str | Path | None = None, seed: int | None = None, **arguments: Any
    ) -> None:
        _require("LLM: seed", seed, _SEED)
        directory = _directory("model", model)
        limits, idle = read_arguments(arguments, directory)
        if idle:
            warnings.warn(f"LLM: {', '.join(idle)}: nothing on a CPU depends on it", stacklevel=2)
        if limits.get("draft_model") is not None:
            limits["draft_model"] = _directory("draft_model", limits["draft_model"])
        other = None if tokenizer is None else Tokenizer(_directory("tokenizer", tokenizer))
        self.engine = Engine.load(directory, EngineConfig(**limits), other)
        self._numbers, self._seed = itertools.count(), seed
        self._turn, self._owner = threading.Lock(), 0

    @cached_property
    def _thinking(self) -> Thinking:
        return Thinking(self.engine.tokenizer)

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        progress: Progress | bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answer prompts.

        Args:
            prompts: texts, lists of token ids, or vLLM's objects: {"prompt": text} or {"prompt_token_ids": ids}, with
                a "cache_salt" where it is wanted; or just one.
            sampling_params: one SamplingParams for all prompts, or one for each; None for the defaults.
            use_tqdm: false: as `progress`.
            progress: who is told of every finished answer; True for a bar on a terminal's stderr after two seconds.
            others: vLLM's other arguments, with the values that ask for nothing.

        Returns:
            One output for each prompt, in order, finished.

        Raises:
            CapacityError: a prompt is too long; nothing was computed.
            InputError: prompts and params do not fit together, or a prompt makes no sense.
        """
        _require_known("generate", others)
        found = read_prompts(prompts, self.engine.tokenizer)
        return self._run(found, _one_each(sampling_params, len(found)), progress if use_tqdm else False)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template: lists of messages, or just one.

        Args:
            messages: as OpenAI's API and the server have them.
            sampling_params, use_tqdm, progress, others: as `generate`.
            chat_template: the text of a template in place of the model's.
            add_generation_prompt: whether the assistant's turn is opened at the end; by default it is.
            continue_final_message: whether the answer continues the last message instead; so does one with
                "prefix": true.
            tools: functions that the model may call, as the template is shown them. What it calls stays text.
            chat_template_kwargs: further variables of the template, such as enable_thinking.

        Raises:
            CheckpointError: the model has no chat template.
            CapacityError, InputError: as `generate`.
        """
        _require_known("chat", others)
        _require("chat_template", chat_template, optional(TEXT))
        _require("continue_final_message", continue_final_message, SWITCH)
        _require("add_generation_prompt", add_generation_prompt, optional(SWITCH))
        _require("tools", tools, _TOOLS)
        _require("chat_template_kwargs", chat_template_kwargs, optional(OBJECT))
        if continue_final_message and add_generation_prompt:
            raise InputError("add_generation_prompt", got="`continue_final_message` too", expected="one of them")

        def make(read: list[Message]) -> Conversation:
            continues = continue_final_message or (not add_generation_prompt and is_continued(read))
            return Conversation(
                messages=read,
                tools=tools,
                opens_answer=not continues if add_generation_prompt is None else add_generation_prompt,
                continues=continues,
                variables=chat_template_kwargs or {},
            )

        found = self._prompts_of(messages, make, chat_template)
        return self._run(found, _one_each(sampling_params, len(found)), progress if use_tqdm else False)

    def _prompts_of(
        self, given: Any, make: Callable[[list[Message]], Conversation], chat_template: str | None
    ) -> list[Prompt]:
        tokenizer, thinking = self.engine.tokenizer, self._thinking
        if chat_template is not None:
            tokenizer = tokenizer.with_template(chat_template)
            thinking = Thinking(tokenizer)
        tokenizer.template_source()  # refuses a model without one
        several = isinstance(given, (list, tuple)) and all(isinstance(each, (list, tuple)) for each in given)
        named = [(f"messages[{at}]", each) for at, each in enumerate(given)] if several else [("messages", given)]
        prompts = []
        for where, each in named:
            conversation = make(read_messages(each, None, where))
            prompt = conversation.prompt(tokenizer, thinking)
            prompts.append(Prompt(prompt.token_ids, prompt.text))
        return prompts

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: Progress | bool
    ) -> list[RequestOutput]:
        with self._alone():
            # All are checked before the first is begun.
            requests = [
                self.engine.prepare(
                    f"llm-{(number := next(self._numbers))}",
                    prompt.token_ids,
                    self._seeded(each, number),
                    streams=False,
                    cache_salt=prompt.cache_salt,
                )
                for prompt, each in zip(prompts, params, strict=True)
            ]
            found: dict[str, RequestOutput] = {}
            try:
                for request in requests:
                    self.engine.submit(request)
                show = partial(bars, after=QUIET_SECONDS) if progress is True else progress or silent
                with show("generate", len(requests), "answer") as task:
                    while self.engine.has_unfinished:
                        for output in self.engine.step():
                            found[output.request_id] = output
                            task.advance()
            finally:  # nothing is left behind by an interrupt
                for request in requests:
                    self.engine.abort(request.request_id)
        outputs = [found[request.request_id] for request in requests]
        return [replace(output, prompt=prompt.text) for output, prompt in zip(outputs, prompts, strict=True)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the engine: one thread at a time, and no call within another."""
        if self._owner == threading.get_ident():
            raise InputError("LLM: got a call from within another, of which it is told the progress")
        with self._turn:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0

    def _seeded(self, params: SamplingParams, number: int) -> SamplingParams:
        if self._seed is None or params.seed is not None:
            return params
        return replace(params, seed=(self._seed + number) % 2**64)


def _directory(name: str, given: Any) -> Path:
    if not isinstance(given, (str, Path)):
        raise InputError(f"LLM: {name}", got=shown(given), expected="the path of a directory")
    return local_model(Path(given))


def _require(name: str, value: Any, kind: Kind) -> None:
    misfit = kind.misfit(value)
    if misfit is not None:
        raise InputError(name, got=shown(misfit[0]), expected=misfit[1])


def _require_known(method: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments that nobody knows, or that ask for what is not done."""
    for name, value in others.items():
        if name not in _REFUSED:
            raise unknown(method, name, (*_REFUSED, *getattr(LLM, method).__annotations__))
        require_neutral(f"{method}: {name}", value, *_REFUSED[name])


def _one_each(params: Any, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(each, SamplingParams) for each in params):
        raise InputError("sampling_params", got=shown(params), expected="SamplingParams, or a list of them")
    if len(params) != count:
        expected = f"one, or one for each of {count} prompts"
        raise InputError("sampling_params", got=f"{len(params)} of them", expected=expected)
    return list(params)
