"""The engine: requests go in, every step moves some of them, outputs come out.

A step is: schedule, one call of the native model, choose tokens, append them, finish what has ended. What a sequence
answers depends on its prompt and parameters only: the core's results have the same bits in any company and any cut,
and a sequence's randomness is its own.

Letters: R rows after which a token is chosen, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.engine.block_manager import BlockManager
from eightfold.engine.draft import DraftModel, open_draft
from eightfold.engine.guesses import Guesser
from eightfold.engine.outputs import Detokenizer, EngineStats, RequestOutput
from eightfold.engine.sampler import Sampled, Sampler, choose_all, prompt_logprobs
from eightfold.engine.scheduler import Scheduler
from eightfold.engine.sequence import Layout, Request, TokenSequence
from eightfold.engine.settings import EngineConfig, load_model
from eightfold.engine.speculate import Lookup, measure_row_cost
from eightfold.engine.structured import Grammar, GrammarCompiler
from eightfold.errors import CapacityError, ConfigError, InputError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.model import PAGE, NativeModel
from eightfold.scheme import QuantType
from eightfold.tokenizer import Tokenizer, stop_token_ids
from eightfold.values import mib, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.engine.sampling_params import SamplingParams, StructuredOutput

# Memory of the cache that is taken from the system before it is needed, while there is nothing else to do.
AHEAD_BYTES = 64 << 20

WHOLE_PROMPTS_NOTE = "Attention mode mindie runs every prompt whole: chunked prefill and prefix caching are off."


class Engine:
    """Many sequences on one model. One thread at a time calls its methods, `prepare` apart.

    Attributes:
        config: the limits as they were given.
        model: the native model.
        model_config: the checkpoint's configuration.
        tokenizer: the checkpoint's tokenizer.
        max_model_len: positions of a sequence, prompt and answer together.
        notes: what a user should know about how it runs, one sentence each.
    """

    def __init__(
        self,
        model: NativeModel,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        stop_ids: frozenset[int] = frozenset(),
        tells_prompts: bool = False,
        draft: NativeModel | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            model: the native model; its cache belongs to the engine from now on.
            tokenizer: the same checkpoint's.
            config: the limits.
            stop_ids: the model's own tokens that end an answer.
            tells_prompts: whether some linears compute prompts and answers differently, so that keys and values depend
                on which tokens are the prompt's.
            draft: a small model that guesses, see draft.open_draft; its cache is the engine's too.

        Raises:
            CapacityError: the cache does not fit the memory.
            ConfigError: a limit does not suit the model.
        """
        self.config, self.model, self.tokenizer, self.model_config = config, model, tokenizer, model.config
        self._stop_ids = stop_ids
        self.max_model_len = _longest_context(model, config)
        pages = _room_for_cache(model, config, draft)
        self.blocks = BlockManager(pages)
        self._caches_prefixes = config.prefix_caching and not model.float_prompts
        self.scheduler = Scheduler(
            config,
            self.blocks,
            min(-(-self.max_model_len // PAGE), pages),
            whole_prompts=model.float_prompts,
        )
        self._counts = self.scheduler.counts
        self._draft = None if draft is None else DraftModel(draft, model, config, self._counts)
        if config.speculate or self._draft is not None:
            cost = measure_row_cost(model) if config.speculate else 1.0
            self.scheduler.guesser = Guesser(config.speculate, cost, self._counts, self._draft)
        self._layout = Layout(self.scheduler.tables)
        self._tells_prompts = tells_prompts
        self._requests: dict[str, Request] = {}
        self._populated = 0  # blocks
        self.notes = (*tokenizer.notes, *([WHOLE_PROMPTS_NOTE] if model.float_prompts else []))

    @classmethod
    def load(cls, directory: Path, config: EngineConfig, tokenizer: Tokenizer | None = None) -> Engine:
        """Load a model directory.

        Args:
            directory: a quantized or float model directory.
            config: limits and options.
            tokenizer: the model's, if it has been loaded before, perhaps with another chat template.

        Raises:
            EightfoldError: the directory, the limits or the machine are not as they must be.
        """
        checkpoint = Checkpoint.open(directory)
        if tokenizer is None:
            tokenizer = Tokenizer(directory)
        load_draft, notes = (None, []) if config.draft_model is None else open_draft(checkpoint, tokenizer, config)
        model = load_model(checkpoint, config)
        kinds = checkpoint.description.tags.values() if checkpoint.description else ()
        engine = cls(
            model,
            tokenizer,
            config,
            stop_ids=stop_token_ids(directory, checkpoint.config_raw),
            tells_prompts=QuantType.W8A8_MIX.value in kinds,
            draft=load_draft and load_draft(),
        )
        engine.notes = (*checkpoint.notes, *engine.notes, *notes)
        return engine

    def prepare(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        streams: bool = True,
        cache_salt: str = "",
    ) -> Request:
        """Check a request and make it ready for `submit`. Any thread may call it at any time.

        Args:
            request_id: an id that no unfinished request has.
            prompt_ids: at least one token.
            params: what is asked for.
            streams: whether each step gives an output, and not only the last.
            cache_salt: only requests with the same one share keys and values of prompts.

        Raises:
            CapacityError: the prompt is empty or too long for the context or the cache.
            InputError: a token is outside the vocabulary, or the structured output asked for makes no sense.
            UnsupportedError: the engine cannot do this in its mode.
        """
        vocab = self.model_config.vocab_size
        try:
            prompt = tuple(prompt_ids)
            self.model_config.require_ids(prompt)
        except TypeError:  # no list, or what is in it is no number
            raise InputError("prompt", got=shown(prompt_ids), expected="a list of token ids") from None
        if params.prompt_logprobs is not None and self.model.float_prompts:
            raise UnsupportedError(
                "prompt_logprobs",
                got="attention mode mindie",
                expected="cache",
                action="Prompts run whole in that mode, and the logits of all their tokens would not fit the memory.",
            )
        max_len = self._max_len(len(prompt), params.max_tokens)
        form = params.structured
        # A form ends where nothing can be added to it, even if it is to go on for as long as it can.
        eos_ids = frozenset[int]() if params.ignore_eos and form is None else self._stop_ids
        request = Request(request_id, prompt, params, eos_ids, streams, self.tokenizer, cache_salt)
        for index in range(params.n):
            grammar = None if form is None else self._compile(form, params)
            sampler = Sampler(params, prompt, vocab, eos_ids, index, grammar)
            detokenizer = Detokenizer(self.tokenizer, params)
            request.sequences.append(TokenSequence(request, index, max_len, sampler, detokenizer))
        first = request.sequences[0]
        if self._caches_prefixes:
            first.hash_blocks(first.prompt_len, self._tells_prompts)
        lookup = Lookup(prompt) if self.config.speculate else None
        for sequence in request.sequences:
            sequence.hashes = list(first.hashes)
            sequence.lookup = lookup and lookup.copy_for(sequence.token_ids)
        return request

    def _compile(self, form: StructuredOutput, params: SamplingParams) -> Grammar:
        return self._grammars.compile(form, params.stop_token_ids, ignores_eos=params.ignore_eos)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.model_config.vocab_size, self._stop_ids)

    def _max_len(self, prompt_len: int, max_tokens: int | None) -> int:
        """Return at how many tokens a sequence ends."""
        capacity = self.blocks.total * PAGE
        if not prompt_len:
            raise CapacityError("prompt", got="no tokens", expected="at least one")
        if prompt_len >= self.max_model_len:
            can_grow = self.max_model_len < self.model_config.reach
            way_out = " or raise `max_model_len`." if can_grow else ": the model cannot look back on more."
            raise CapacityError(
                "prompt",
                got=f"{prompt_len} tokens",
                expected=f"at most {self.max_model_len - 1}, and room for an answer",
                action=f"Shorten it{way_out}",
            )
        longest = self.max_model_len if max_tokens is None else min(self.max_model_len, prompt_len + max_tokens)
        # The last token's own key and value are never needed.
        if max_tokens is None and prompt_len <= capacity:
            longest = min(longest, capacity + 1)
        if longest - 1 > capacity:
            raise CapacityError(
                "request",
                got=f"{prompt_len} tokens and {longest - prompt_len} new ones",
                expected=f"at most {capacity + 1} together, which the key/value cache holds",
                action="Raise `kv_memory`, or ask for fewer tokens.",
            )
        return longest

    def submit(self, request: Request) -> None:
        """Put a prepared request in line.

        Raises:
            InputError: there is an unfinished request with its id.
        """
        if request.request_id in self._requests:
            raise InputError("request id", got=request.request_id, expected="one that no unfinished request has")
        self._requests[request.request_id] = request
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, streams: bool = True
    ) -> None:
        """Check a request and put it in line; see `prepare` and `submit`."""
        self.submit(self.prepare(request_id, prompt_ids, params, streams=streams))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request where it stands and return its last output; None if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish("abort")
                self._finish(sequence)
        return self._output(request, request.sequences)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is something to do."""
        return bool(self._requests)

    @property
    def request_ids(self) -> list[str]:
        """Of the unfinished requests."""
        return list(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Counts as they are now."""
        return replace(
            self._counts,
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            blocks_total=self.blocks.total,
            blocks_used=self.blocks.used,
        )

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs of the requests that it moved."""
        plan = self.scheduler.schedule()
        if not plan:
            assert not self._requests, "the scheduler is stuck"
            return []
        step = self._layout.of(plan, self.scheduler.version)
        started = time.perf_counter()
        logits, best = self.model.run(step)
        prompt_tokens = [sequence.scheduled for sequence in plan if sequence.scheduled > 1]
        seconds = time.perf_counter() - started
        self.scheduler.pace.note(len(plan) - len(prompt_tokens), sum(prompt_tokens), seconds)
        if self._draft is not None and not prompt_tokens:
            self._draft.large_times.note(len(step.token_ids), seconds)
        moved = self._advance(plan, logits)
        self._choose(moved, logits, best)
        return self._outputs(moved)

    def populate_cache(self) -> Iterator[None]:
        """Make the blocks ready that the next prompts will take, a bit with each step of the iterator."""
        ahead = max(1, AHEAD_BYTES // self.model.page_bytes)
        while self._populated < min(self.blocks.begun + ahead, self.blocks.total):
            yield from self.model.populate_cache(self._populated)
            if self._draft is not None:
                yield from self._draft.model.populate_cache(self._populated)
            self._populated += 1

    def check_integrity(self) -> None:
        """Prove that every block is accounted for and every sequence is where it says it is."""
        self.scheduler.check_integrity()
        unfinished = {id(s) for r in self._requests.values() for s in r.sequences if s.finish_reason is None}
        known = {id(s) for s in (*self.scheduler.waiting, *self.scheduler.running)}
        assert known == unfinished, "the scheduler's sequences are not those of the unfinished requests"

    def _advance(self, plan: list[TokenSequence], logits: NDArray[Any]) -> list[TokenSequence]:
        """Note what was computed; return the sequences that get tokens."""
        moved = []
        for sequence in plan:
            if sequence.computed < sequence.prompt_len:
                self._counts.prompt_tokens += min(sequence.scheduled, sequence.prompt_len - sequence.computed)
            if sequence.wants_prompt_logits:
                self._collect_prompt_logprobs(sequence, logits)
            sequence.computed += sequence.scheduled
            if sequence.computed == len(sequence.token_ids):
                moved.append(sequence)
            else:
                self._name_blocks(sequence)
        return moved

    def _collect_prompt_logprobs(self, sequence: TokenSequence, logits: NDArray[Any]) -> None:
        """Take the log-probabilities of the tokens behind the positions that were computed."""
        request = sequence.request
        found, top = request.prompt_logprobs, request.params.prompt_logprobs
        assert found is not None and top is not None
        begin = len(found)
        end = min(sequence.computed + sequence.scheduled + 1, sequence.prompt_len)
        if begin < end:
            # Row `row` is the last scheduled token's; the one before token `begin` is wanted.
            first = sequence.row - (sequence.scheduled - 1) + begin - 1 - sequence.computed
            rows = logits[first : first + end - begin]
            found += prompt_logprobs(rows, request.prompt_ids[begin:end], top, threads=self.model.threads)

    def _choose(self, moved: list[TokenSequence], logits: NDArray[Any], best: NDArray[Any]) -> None:
        """Choose tokens, position after position where there are drafts, until one differs from the draft."""
        ids: list[int] = best.tolist()
        going = moved
        while going:
            chosen = choose_all(
                [sequence.sampler for sequence in going],
                logits,
                [ids[sequence.row] for sequence in going],
                rows=[sequence.row for sequence in going if sequence.sampler.needs_logits],
                threads=self.model.threads,
            )
            going = [sequence for sequence, each in zip(going, chosen, strict=True) if self._take(sequence, each)]
        self._counts.passes += len(moved)
        for sequence in moved:
            sequence.draft = []
            if self._draft is not None:
                self._draft.settle(sequence)
            if sequence.finish_reason is None:
                self._name_blocks(sequence)
            else:
                self._finish(sequence)

    def _take(self, sequence: TokenSequence, sampled: Sampled) -> bool:
        """Append a token or end the sequence; return whether the draft foretold it, so that the next row counts."""
        self._counts.generated_tokens += 1
        if sequence.has_failed():
            return False
        foretold = bool(sequence.draft) and sequence.draft[0] == sampled.token_id
        if foretold:
            self._count_right_guess(sequence)
        if sequence.ends_with(sampled.token_id):
            return False
        sequence.append(sampled)
        if not foretold or sequence.finish_reason is not None:
            return False
        del sequence.draft[0]
        sequence.computed += 1
        sequence.row += 1
        return True

    def _count_right_guess(self, sequence: TokenSequence) -> None:
        if sequence.drafter.made:
            sequence.drafter.right += 1
            self._counts.model_accepted += 1
        else:
            self._counts.accepted += 1

    def _name_blocks(self, sequence: TokenSequence) -> None:
        """Let others find the blocks that have become full."""
        full = sequence.computed // PAGE
        if full == sequence.named or not self._caches_prefixes:
            return
        sequence.hash_blocks(full * PAGE, self._tells_prompts)
        for at in range(sequence.named, full):
            self.blocks.name(sequence.blocks[at], sequence.hashes[at])
        sequence.named = full

    def _finish(self, sequence: TokenSequence) -> None:
        """Take a sequence that has ended out of the line; its full blocks stay as long as nobody needs others."""
        if sequence.slot >= 0:
            self._name_blocks(sequence)
        self.scheduler.remove(sequence)

    def _outputs(self, moved: list[TokenSequence]) -> list[RequestOutput]:
        now = time.monotonic()
        by_request: dict[int, list[TokenSequence]] = {}
        for sequence in moved:
            by_request.setdefault(id(sequence.request), []).append(sequence)
        outputs = []
        for sequences in by_request.values():
            request = sequences[0].request
            if request.times.first_token is None:
                request.times.first_token = now
            if request.streams or request.is_finished:
                outputs.append(self._output(request, sequences))
        return outputs

    def _output(self, request: Request, moved: list[TokenSequence]) -> RequestOutput:
        output = request.output(moved)
        if output.finished:
            request.times.finished = time.monotonic()
            del self._requests[request.request_id]
        return output


def _longest_context(model: NativeModel, config: EngineConfig) -> int:
    """Return how many positions a sequence may have.

    Raises:
        ConfigError: more are asked for than the model knows.
    """
    most = model.config.reach
    wanted = config.max_model_len or model.config.context
    if wanted > most:
        raise ConfigError(
            "max_model_len", got=wanted, expected=f"at most {most}, which is all this model can look back on"
        )
    return wanted


def _room_for_cache(model: NativeModel, config: EngineConfig, draft: NativeModel | None) -> int:
    """Allocate the cache and return its pages: as configured, else half of what is free beside the weights.

    More than the longest sequences need in full number is never taken. Pages that are never written take no memory. A
    draft model has as many pages as the model, within the same memory.

    Raises:
        CapacityError: not one page fits, or the configured size does not fit the memory.
        ConfigError: more positions are asked for than the model knows.
    """
    most = config.max_num_seqs * -(-_longest_context(model, config) // PAGE)
    page_bytes = model.page_bytes + (0 if draft is None else draft.page_bytes)
    size, free = config.kv_memory, model.room()
    if size is None:
        beside = free if free is None or draft is None else max(free - draft.weight_bytes, 0)
        size = most * page_bytes if beside is None else beside // 2
    pages = min(size // page_bytes, most)
    without = "" if draft is None else "Leave `draft_model` out. Or: "
    if not pages:
        raise CapacityError(
            "key/value cache",
            got=mib(size, 1),
            expected=f"at least {mib(page_bytes, 1)}, which {PAGE} positions take",
            action=f"{without}Raise `kv_memory` or close other programs.",
        )
    model.allocate_cache(pages * PAGE, f"{without}Lower `kv_memory`.")
    if draft is not None:
        draft.allocate_cache(pages * PAGE, f"{without}Lower `kv_memory`.")
    return pages
