"""`eightfold run --prompt`: one answer, of the engine or of the reference backend."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.cli import console
from eightfold.cli.generating import sampling_params
from eightfold.errors import CapacityError, UnsupportedError

if TYPE_CHECKING:
    from eightfold.engine.settings import EngineConfig
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel
    from eightfold.tokenizer import Tokenizer

# Is told of each piece of text; None where nobody reads along.
Show = Callable[[str], None] | None


class Answer(NamedTuple):
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


# Text, tokens and the reason of an answer's end.
_Generated = tuple[str, list[int], str | None]

# What answers, and with which model; None: not with one of the native core.
_Loaded = tuple[Callable[[], _Generated], "NativeModel | None"]


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
        config: of the engine, but for what follows from the prompt's length.
        backend: native or reference.
        measures: whether the memory of weights is measured: then they are loaded alone, which takes longer.
    """

    model: Path
    prompt: str
    chat: bool
    chat_template: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    config: EngineConfig
    backend: str
    measures: bool = False

    def answer(self, show: Show = None) -> Answer:
        """Answer the prompt.

        Raises:
            EightfoldError: the model, the prompt or the options are not as they must be.
        """
        from eightfold.format.checkpoint import Checkpoint

        with console.loading():
            checkpoint = Checkpoint.open(self.model)
            read = functools.cache(lambda: self._read(checkpoint))
            load = self._reference if self.backend == "reference" else self._native
            generate, model = load(checkpoint, read, show)
        started = time.monotonic()
        text, token_ids, reason = generate()
        seconds = round(time.monotonic() - started, 3)
        world_size, weights = (1, []) if model is None else (model.world_size, model.resident_weights_mib)
        return Answer(text, token_ids, len(read().ids), reason, seconds, self.backend, world_size, weights)

    def _read(self, checkpoint: Checkpoint) -> _Prompt:
        """Return the prompt as tokens.

        Raises:
            CapacityError: the prompt is empty, or it and its answer do not fit the model's context.
        """
        from eightfold.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.model, self.chat_template)
        if self.chat:
            messages = [{"role": "user", "content": self.prompt}]
            ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            ids = tokenizer.encode(self.prompt)
        if not ids:
            action = "Give some text with --prompt."
            raise CapacityError("prompt", got="no tokens", expected="at least one", action=action)
        if len(ids) + self.max_new_tokens > (context := checkpoint.config.max_position_embeddings):
            raise CapacityError(
                "prompt",
                got=f"{len(ids)} tokens and {self.max_new_tokens} new ones",
                expected=f"1 to {context} together",
                action="Shorten the prompt or lower --max-new-tokens.",
            )
        return _Prompt(tokenizer, ids)

    def _native(self, checkpoint: Checkpoint, read: Callable[[], _Prompt], show: Show) -> _Loaded:
        """Load an engine for this one request, and the prompt while its weights are made ready."""
        from eightfold.engine.loading import load_model

        def prepare() -> None:
            import eightfold.engine.engine  # noqa: F401

            sampling_params(self.sampling)
            read()

        if self.measures:
            prepare()
        model = load_model(
            checkpoint,
            None if self.measures else prepare,
            threads=self.config.threads,
            dynamic=self.config.dynamic,
            attention=self.config.attention_mode,
        )
        from eightfold.engine.engine import Engine
        from eightfold.tokenizer import stop_token_ids

        tokenizer, prompt_ids = read()
        positions = len(prompt_ids) + self.max_new_tokens
        model.allocate_cache(positions)  # refuses what does not fit, in the words of this command
        config = replace(
            self.config,
            max_num_seqs=1,
            max_model_len=positions,
            kv_memory=model.pages * model.page_bytes,
            prefix_caching=False,
        )
        engine = Engine(model, tokenizer, config, stop_ids=stop_token_ids(self.model, checkpoint.config_raw))
        params = sampling_params(self.sampling, max_tokens=self.max_new_tokens)
        engine.add_request("run", prompt_ids, params, streams=show is not None)

        def generate() -> _Generated:
            while engine.has_unfinished:
                for output in engine.step():
                    (answer,) = output.outputs
                    if show is not None:
                        show(answer.delta_text)
            return answer.text, answer.token_ids, answer.finish_reason

        return generate, model

    def _reference(self, checkpoint: Checkpoint, read: Callable[[], _Prompt], show: Show) -> _Loaded:
        """Load the oracle, which is greedy."""
        if self.sampling:
            raise UnsupportedError("sampling options", got="the reference backend", expected="the native one")
        console.require_torch("run --backend reference")
        from eightfold.model.reference.load import Decoder
        from eightfold.tokenizer import StreamDecoder, stop_token_ids

        tokenizer, prompt_ids = read()
        stop_ids = stop_token_ids(self.model, checkpoint.config_raw)
        decoder = Decoder(checkpoint, self.config.dynamic, self.config.attention_mode)

        def answer() -> _Generated:
            stream, tell = StreamDecoder(tokenizer), show or (lambda text: None)
            token_ids, reason = list[int](), "length"
            for token in decoder.generate(prompt_ids, self.max_new_tokens):
                if token in stop_ids:
                    reason = "stop"
                    break
                token_ids.append(token)
                tell(stream.push(token))
            tell(stream.finish())
            return tokenizer.decode(token_ids), token_ids, reason

        return answer, None
