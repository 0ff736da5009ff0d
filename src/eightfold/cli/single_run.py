"""`eightfold run --prompt`: the greedy answer of any backend, or a sampled one of the engine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from eightfold.cli import console
from eightfold.cli.choices import Backend
from eightfold.cli.sampling import sampling_params
from eightfold.errors import UnsupportedError

if TYPE_CHECKING:
    from eightfold.engine.engine import Engine
    from eightfold.engine.sampling_params import SamplingParams
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel
    from eightfold.tokenizer import Tokenizer

# Is told of each piece of text.
Show = Callable[[str], None]


class Outcome(NamedTuple):
    """An answer; `seconds` without loading. Weights: by how much loading has made each process larger, if measured."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str | None
    seconds: float
    backend: str
    world_size: int
    resident_weights_mib: list[float]  # of each process


class _Prompt(NamedTuple):
    tokenizer: Tokenizer
    ids: list[int]


class _Generation(Protocol):
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"]: ...


# Prompt, new tokens at most, stop tokens, and who is told of each token.
_Generate = Callable[[Sequence[int], int, frozenset[int], Callable[[int], None]], _Generation]

# Text, tokens and the reason of an answer's end.
_Answered = tuple[str, list[int], str | None]

# What answers, and with which model; None: not with one of the native core.
_Loaded = tuple[Callable[[Show], _Answered], "NativeModel | None"]


@dataclass(frozen=True)
class Single:
    """What is asked.

    Attributes:
        model: directory.
        prompt: a text to continue, or with `chat` what a user says.
        chat: whether it goes into the chat template.
        chat_template: a template in place of the model's.
        max_new_tokens: of the answer.
        sampling: parameters; without any the answer is greedy.
        settings: of EngineConfig: threads, dynamic, attention_mode.
        backend: native or reference.
        measures: whether the memory of weights is measured: then they are loaded alone, which takes longer.
    """

    model: Path
    prompt: str
    chat: bool
    chat_template: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    settings: dict[str, Any]
    backend: Backend
    measures: bool = False

    def answer(self, show: Show) -> Outcome:
        """Answer the prompt.

        Raises:
            EightfoldError: the model, the prompt or the options are not as they must be.
        """
        from eightfold.format.checkpoint import Checkpoint

        read = functools.cache(self._read)
        with console.loading():
            checkpoint = Checkpoint.open(self.model)
            if self.measures:
                read()
            answer, model = (self._sampled if self.sampling else self._greedy)(checkpoint, read)
        prompt_tokens = len(read().ids)
        started = time.monotonic()
        text, token_ids, reason = answer(show)
        seconds, weights = round(time.monotonic() - started, 3), [] if model is None else model.resident_weights_mib
        world_size = 1 if model is None else model.world_size
        return Outcome(text, token_ids, prompt_tokens, reason, seconds, self.backend.value, world_size, weights)

    def _read(self) -> _Prompt:
        from eightfold.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.model, self.chat_template)
        if not self.chat:
            return _Prompt(tokenizer, tokenizer.encode(self.prompt))
        messages = [{"role": "user", "content": self.prompt}]
        return _Prompt(tokenizer, tokenizer.encode_chat(messages, add_generation_prompt=True))

    def _greedy(self, checkpoint: Checkpoint, read: Callable[[], _Prompt]) -> _Loaded:
        """Load a model, and the prompt meanwhile; return what answers with it."""
        from eightfold.tokenizer import StreamDecoder, stop_token_ids

        load = _reference if self.backend is Backend.reference else _native
        generate, model = load(checkpoint, self.settings, None if self.measures else read)
        tokenizer, prompt_ids = read()
        stop_ids = stop_token_ids(self.model, checkpoint.config_raw)

        def answer(show: Show) -> _Answered:
            stream = StreamDecoder(tokenizer)
            found = generate(prompt_ids, self.max_new_tokens, stop_ids, lambda token: show(stream.push(token)))
            show(stream.finish())
            return tokenizer.decode(found.token_ids), found.token_ids, found.finish_reason

        return answer, model

    def _sampled(self, checkpoint: Checkpoint, read: Callable[[], _Prompt]) -> _Loaded:
        """Load an engine; return what answers with it."""
        if self.backend is Backend.reference:
            raise UnsupportedError("sampling options", got="the reference backend", expected="the native one")
        from eightfold.engine.engine import Engine
        from eightfold.engine.settings import EngineConfig
        from eightfold.generation import require_room

        tokenizer, prompt_ids = read()
        require_room(checkpoint.config, len(prompt_ids), self.max_new_tokens)
        params = sampling_params(self.sampling, max_tokens=self.max_new_tokens)
        engine = Engine.load(self.model, EngineConfig(max_num_seqs=1, **self.settings), tokenizer)
        return functools.partial(_run, engine, prompt_ids, params), engine.model


def _run(engine: Engine, prompt_ids: list[int], params: SamplingParams, show: Show) -> _Answered:
    engine.add_request("run", prompt_ids, params)
    while engine.has_unfinished:
        for output in engine.step():
            (answer,) = output.outputs
            show(answer.delta_text)
    return answer.text, answer.token_ids, answer.finish_reason


def _reference(
    checkpoint: Checkpoint, settings: dict[str, Any], beside: Callable[[], object] | None
) -> tuple[_Generate, None]:
    console.require_torch("run --backend reference")
    if beside is not None:
        beside()
    from eightfold.model.reference.generate import generate
    from eightfold.model.reference.load import Decoder

    return functools.partial(generate, Decoder(checkpoint, settings["dynamic"], settings["attention_mode"])), None


def _native(
    checkpoint: Checkpoint, settings: dict[str, Any], beside: Callable[[], object] | None
) -> tuple[_Generate, NativeModel]:
    from eightfold.engine.loading import load_model
    from eightfold.model.native.generate import generate

    dynamic, attention = settings["dynamic"], settings["attention_mode"]
    model = load_model(checkpoint, beside, threads=settings["threads"], dynamic=dynamic, attention=attention)
    return functools.partial(generate, model), model
