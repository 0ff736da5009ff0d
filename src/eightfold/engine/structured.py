"""Answers of a given form: which tokens may come next, by llguidance.

A mask has one bit for each token of the vocabulary, lowest bit first, in words of 32 bits; a one lets the token pass.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, WeakSet

import numpy as np

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.errors import BusyError, DependencyError, InputError, UnsupportedError
from eightfold.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.engine.form_tokens import FormTokens

# Compiled forms are kept up to these numbers, and until nobody has asked for them for a while.
KEPT, KEPT_BYTES, IDLE_SECONDS = 64, 64 * 2**20, 300.0

# Forms of more bytes than the first are refused while those in use have more than the second.
SMALL_BYTES, USED_BYTES = 2**20, 256 * 2**20

# Masks make a form larger: by at most so much a second that is spent on them.
GROWTH = 64 * 2**20


@dataclass(eq=False)
class Form:
    """A compiled form, shared by the answers that keep to it.

    Attributes:
        name: the field of StructuredOutput that it comes from.
        matcher: llguidance's, at the beginning of an answer.
        tokens: what it calls to cut a text into tokens.
        compiled_bytes: what it took when it was compiled.
        mask_seconds: spent on its masks since then.
        used: time.monotonic when it was last asked for.
    """

    name: str
    matcher: Any
    tokens: FormTokens
    compiled_bytes: int
    mask_seconds: float = 0.0
    used: float = 0.0

    @property
    def size(self) -> int:
        """Bytes that it takes at most."""
        return self.compiled_bytes + int(self.mask_seconds * GROWTH)


class Opening:
    """What stands before a form: anything but stop tokens, until a text is complete.

    Args:
        text: the form begins with the token behind it; not empty.
        tokenizer: the model's.
        mask: (W,) of the tokens that may stand there.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, mask: NDArray[np.int32]) -> None:
        self.mask = mask
        self._text, self._decoder = text, StreamDecoder(tokenizer, keep_special=True)
        self._end = ""  # of what was said so far, shorter than the text

    def ends_with(self, token: int) -> bool:
        """Go on by a token; return whether the text is complete now."""
        said = self._end + self._decoder.push(token)
        self._end = said[max(len(said) - len(self._text) + 1, 0) :]
        return self._text in said


class Grammar:
    """How far one answer has come in its form.

    Args:
        form: the compiled form.
        opening: what stands before it; None: the form begins at once.
        going_on: mask (W,) without the tokens that end no answer as long as another can follow; None for none.
        begin: the token with which the opening begins, if any other begins the form; None: the opening has to be there.

    Attributes:
        failure: why the answer cannot go on in its form, in a sentence; None as long as it can.
    """

    def __init__(
        self,
        form: Form,
        opening: Opening | None = None,
        going_on: NDArray[np.int32] | None = None,
        begin: int | None = None,
    ) -> None:
        self.failure: str | None = None
        self._form, self._matcher, self._opening, self._going_on = form, form.matcher.deep_copy(), opening, going_on
        self._begin = begin  # until the first token

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Write the mask (W,) of tokens that may come next: only the stop tokens once the answer is complete.

        It is of no use if the answer has failed by then.
        """
        from llguidance.numpy import fill_next_token_bitmask

        if self._opening is not None and self._begin is None:
            mask[:] = self._opening.mask
            return
        started = time.perf_counter()
        fill_next_token_bitmask(self._matcher, mask.reshape(1, -1))
        self._form.mask_seconds += time.perf_counter() - started
        self._look()
        if self._going_on is not None and (mask & self._going_on).any():
            mask &= self._going_on
        if self._begin is not None:
            mask |= ~mask_without([self._begin], len(mask) * 32)

    def accept(self, token: int) -> bool:
        """Go on by a token. False: the form does not allow it, or became too complex; the answer has failed."""
        begin, self._begin = self._begin, None
        if begin not in (None, token):
            self._opening = None
        if self._opening is None:
            self._matcher.consume_token(token)
            self._look()
        elif self._opening.ends_with(token):
            self._opening = None
        return self.failure is None

    def _look(self) -> None:
        """Notice that llguidance has given up, or was interrupted."""
        self._form.tokens.raise_stopped()
        if self.failure is None and self._matcher.is_error():
            from eightfold.engine.forms import refusal, why

            self.failure = str(refusal(self._form.name, why(self._matcher), "one that can be kept to until it ends"))

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can be added."""
        return self._opening is None and self.failure is None and bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes grammars for one tokenizer. Threads may share it.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; ids without a token are never allowed.
        stop_ids: tokens that end an answer, allowed where the form is complete.

    Raises:
        DependencyError: llguidance is not installed.
        InputError: llguidance cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        from eightfold.engine.form_tokens import Vocabulary
        from eightfold.engine.forms import Trial

        self._library = _library()
        self._model_tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids
        vocabulary = Vocabulary(tokenizer.content.decode(), vocab_size, sorted(stop_ids))
        self._trial = Trial(vocabulary)
        self._trial.start()
        try:
            self._tokenizer, self._tokens = vocabulary.load(self._library)
        except Exception as error:  # of both libraries
            self._trial.end()
            path = tokenizer.directory / "tokenizer.json"
            action = "Leave out the form of the answer: this model cannot keep to one."
            raise InputError("tokenizer for structured output", where=path, got=error, action=action) from None
        self._kept: OrderedDict[tuple[str, Any], Form] = OrderedDict()  # the last used is the last
        # What was refused and when, because to find that out may take seconds.
        self._refused: OrderedDict[tuple[str, Any], tuple[str, float]] = OrderedDict()
        self._alive: WeakSet[Form] = WeakSet()  # kept, or of an answer that goes on
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def compile(
        self, structured: StructuredOutput, stop_token_ids: Iterable[int] = (), *, ignores_eos: bool = False
    ) -> Grammar:
        """Return a grammar at its beginning. One that was asked for lately costs little.

        Args:
            structured: the form.
            stop_token_ids: tokens that would end this answer, besides those that end every one.
            ignores_eos: whether the form goes on for as long as it can.

        Raises:
            BusyError: it is large, and those of answers that go on take too much already.
            InputError: the schema, expression or grammar is wrong or too complex; llguidance's words say why.
        """
        form, opening, begin = self._form(*structured.given), None, list[int]()
        if structured.begins_after:
            mask = mask_without(self._stop_ids.union(stop_token_ids), self._vocab_size)
            opening = Opening(structured.begins_after, self._model_tokenizer, mask)
            begin = self._model_tokenizer.encode(structured.opened_by, special_tokens=False)
        going_on = mask_without(self._stop_ids, self._vocab_size) if ignores_eos else None
        return Grammar(form, opening, going_on, begin[0] if len(begin) == 1 else None)

    def _form(self, name: str, value: Any) -> Form:
        """Return a compiled form, which is kept for a while."""
        key = name, value
        with self._lock:
            form = self._kept.get(key)
            refused = self._refused.get(key)
        if refused is not None and time.monotonic() - refused[1] < IDLE_SECONDS:
            raise InputError(refused[0])
        if form is None:
            form = self._compile(name, value)
        with self._lock:
            form.used = time.monotonic()
            self._kept[key] = form
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT or sum(each.size for each in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            self._watch()
        return form

    def _watch(self) -> None:
        """Let a timer drop what is idle."""
        if self._timer is None and self._kept:
            self._timer = threading.Timer(IDLE_SECONDS, _call, [WeakMethod(self._drop_idle)])
            self._timer.daemon = True
            self._timer.start()

    def _drop_idle(self) -> None:
        with self._lock:
            self._timer, long_ago = None, time.monotonic() - IDLE_SECONDS
            while self._kept and next(iter(self._kept.values())).used <= long_ago:
                self._kept.popitem(last=False)
            self._watch()

    def _compile(self, name: str, value: Any) -> Form:
        from eightfold.engine.forms import build, refusal

        try:
            size = self._trial.require(name, value)
            form = Form(name, build(self._library, self._tokenizer, name, value).matcher, self._tokens, size)
            self._tokens.raise_stopped()
        except UnsupportedError:
            raise
        except Exception as error:
            refused = error if isinstance(error, InputError) else refusal(name, error)
            with self._lock:
                self._refused[name, value] = str(refused), time.monotonic()
                while len(self._refused) > KEPT:
                    self._refused.popitem(last=False)
            raise refused from None
        with self._lock:
            used = sum(each.size for each in self._alive)
            if used > USED_BYTES and form.size > SMALL_BYTES:
                raise BusyError(
                    f"structured {name}",
                    got=f"{form.size / 2**20:.0f} MiB beside {used >> 20} MiB of forms in use",
                    expected=f"at most {USED_BYTES >> 20} MiB",
                    action="Try again when other answers are complete.",
                )
            self._alive.add(form)
        return form


def _call(method: WeakMethod[Callable[[], None]]) -> None:
    """Call a method, if there still is its object: a timer keeps nobody alive."""
    found = method()
    if found is not None:
        found()


def fill_masks(grammars: Sequence[Grammar], vocab_size: int) -> NDArray[np.int32]:
    """Return the masks (len(grammars), W) of several answers."""
    masks = np.empty((len(grammars), mask_words(vocab_size)), np.int32)
    for grammar, mask in zip(grammars, masks, strict=True):
        grammar.fill(mask)
    return masks


def mask_without(token_ids: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """Return a mask (W,) that lets all tokens pass but some."""
    mask = np.full(mask_words(vocab_size), -1, np.int32)
    for token in token_ids:
        if token < vocab_size:
            mask[token // 32] &= np.int32(~np.uint32(1 << token % 32).view(np.int32))
    return mask


def mask_words(vocab_size: int) -> int:
    """Return W, the words of a mask."""
    return -(-vocab_size // 32)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DependencyError(
            "structured output needs llguidance",
            got="none installed",
            action="Install it: pip install 'eightfold[serve]'",
        ) from None
    return llguidance
