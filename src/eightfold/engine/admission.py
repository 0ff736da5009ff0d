"""What an engine takes on: the size of its cache, and which requests can be answered at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from eightfold.engine.detokenizer import Detokenizer
from eightfold.engine.sampler import Sampler
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.sequence import Request, TokenSequence
from eightfold.engine.settings import EngineConfig
from eightfold.engine.structured import GrammarCompiler
from eightfold.errors import CapacityError, ConfigError, UnsupportedError
from eightfold.model.native.model import PAGE, NativeModel
from eightfold.tokenizer import Tokenizer


def longest_context(model: NativeModel, config: EngineConfig) -> int:
    """Return how many positions a sequence may have.

    Raises:
        ConfigError: more are asked for than the model knows.
    """
    most = model.config.max_position_embeddings
    wanted = config.max_model_len or most
    if wanted > most:
        raise ConfigError(
            "max_model_len", got=wanted, expected=f"at most {most}, which is all this model can look back on"
        )
    return wanted


def room_for_cache(model: NativeModel, config: EngineConfig) -> int:
    """Allocate the cache and return its pages: as configured, else half of what is free beside the weights.

    More than the longest sequences need in full number is never taken. Pages that are never written take no memory.

    Raises:
        CapacityError: not one page fits, or the configured size does not fit the memory.
        ConfigError: more positions are asked for than the model knows.
    """
    most = config.max_num_seqs * -(-longest_context(model, config) // PAGE)
    size = config.kv_memory
    if size is None:
        free = model.room()
        size = most * model.page_bytes if free is None else free // 2
    pages = min(size // model.page_bytes, most)
    if not pages:
        raise CapacityError(
            "key/value cache",
            got=f"{size / 2**20:.1f} MiB",
            expected=f"at least {model.page_bytes / 2**20:.1f} MiB, which {PAGE} positions take",
            action="Raise `kv_memory` or close other programs.",
        )
    model.allocate_cache(pages * PAGE, "Lower `kv_memory`.")
    return pages


class Admission:
    """Checks requests and makes them ready to run.

    Attributes:
        max_model_len: positions of a sequence, prompt and answer together.
    """

    def __init__(
        self, model: NativeModel, tokenizer: Tokenizer, config: EngineConfig, pages: int, stop_ids: frozenset[int]
    ) -> None:
        self._model, self._tokenizer, self._stop_ids = model, tokenizer, stop_ids
        self.max_model_len = longest_context(model, config)
        self._capacity = pages * PAGE

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer, self._model.config.vocab_size, self._stop_ids)

    def request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, streams: bool = True
    ) -> Request:
        """Return a request that can be answered.

        Raises:
            CapacityError: the prompt is empty or too long for the context or the cache.
            InputError: a token is outside the vocabulary, or the structured output asked for makes no sense.
            UnsupportedError: prompts run whole here and their log-probabilities are asked for.
        """
        prompt = tuple(prompt_ids)
        self._model.config.require_ids(prompt)
        if params.prompt_logprobs is not None and self._model.float_prompts:
            raise UnsupportedError(
                "prompt_logprobs",
                got="attention mode mindie",
                expected="cache",
                action="Prompts run whole in that mode, and the logits of all their tokens would not fit the memory.",
            )
        max_len = self._max_len(len(prompt), params.max_tokens)
        eos_ids = frozenset[int]() if params.ignore_eos else self._stop_ids
        request = Request(request_id, prompt, params, eos_ids, streams, self._tokenizer)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        for index in range(params.n):
            grammar = None if params.structured is None else self._grammars.compile(params.structured)
            sampler = Sampler(params, prompt, self._model.config.vocab_size, eos_ids, index, grammar)
            detokenizer = Detokenizer(self._tokenizer, params)
            request.sequences.append(TokenSequence(request, index, max_len, sampler, detokenizer))
        return request

    def _max_len(self, prompt_len: int, max_tokens: int | None) -> int:
        """Return at how many tokens a sequence ends."""
        if not prompt_len:
            raise CapacityError("prompt", got="no tokens", expected="at least one")
        if prompt_len >= self.max_model_len:
            can_grow = self.max_model_len < self._model.config.max_position_embeddings
            way_out = " or raise `max_model_len`." if can_grow else ": the model cannot look back on more."
            raise CapacityError(
                "prompt",
                got=f"{prompt_len} tokens",
                expected=f"at most {self.max_model_len - 1}, and room for an answer",
                action=f"Shorten it{way_out}",
            )
        longest = self.max_model_len if max_tokens is None else min(self.max_model_len, prompt_len + max_tokens)
        # The last token's own key and value are never needed.
        if max_tokens is None and prompt_len <= self._capacity:
            longest = min(longest, self._capacity + 1)
        if longest - 1 > self._capacity:
            raise CapacityError(
                "request",
                got=f"{prompt_len} tokens and {longest - prompt_len} new ones",
                expected=f"at most {self._capacity + 1} together, which the key/value cache holds",
                action="Raise `kv_memory`, or ask for fewer tokens.",
            )
        return longest
