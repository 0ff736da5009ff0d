"""Perplexity of a model, and its distance from another one, on the same text, with either backend.

    nll = - mean_t log p(x_t | x_<t)      ppl = exp(nll)
    KL  = mean_t sum_v p(v) (log p(v) - log q(v))        p: the float model, q: the one being judged; nats

The text is tokenized once, without special tokens, and cut into chunks of equal length; each chunk stands alone, so
a chunk of C tokens gives C - 1 predictions.

Letters: R positions whose logits are held at a time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eightfold.config import ModelConfig
from eightfold.errors import CheckpointError, ConfigError, InputError
from eightfold.files import read_text
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.quant.dataset import begins_as_json, plain_text, read_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.model.reference.load import Decoder

# R, unless prompts have to run whole: 128 x 128,256 float32 are 66 MB.
_STEP_TOKENS = 128

# How much of a text is read: more than a CPU measures in a day.
_TEXT_BYTES = 16 << 20

# A text in chunks of token ids.
Chunks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Evaluation:
    """Averages over positions. The second half is None without a model to compare with."""

    nll: float
    ppl: float
    tokens: int  # predictions
    chunks: int
    ppl_against: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None  # share of positions with the same most likely token


def evaluate_native(
    model: NativeModel,
    chunks: Chunks,
    against: NativeModel | None = None,
    on_chunk: Callable[[], None] = lambda: None,
    *,
    generated: bool = False,
    positions: Positions | None = None,
) -> Evaluation:
    """Measure a model on chunks, and its distance from `against`.

    Args:
        model: loaded; its cache is replaced, as that of `against`.
        chunks: token ids, each chunk at least two.
        against: usually the float model; the same vocabulary.
        on_chunk: called after each.
        generated: compute the tokens as if they had been generated.
        positions: takes in what is found at each position.

    Raises:
        CapacityError: no memory for the cache.
        CheckpointError: the model says NaN.
        ConfigError: the two have different vocabularies.
    """
    models = [model] if against is None else [model, against]
    _require_same_vocabulary([each.config for each in models])
    whole = any(each.float_prompts for each in models) and not generated
    step = max(map(len, chunks)) if whole else _STEP_TOKENS
    streams = [_native_log_probs(each, chunks, step, generated) for each in models]
    return _evaluate(streams, chunks, step, on_chunk, Positions() if positions is None else positions)


def evaluate_reference(
    decoder: Decoder,
    chunks: Chunks,
    against: Decoder | None = None,
    on_step: Callable[[], None] = lambda: None,
    origin: Literal["prompt", "generated"] = "prompt",
    positions: Positions | None = None,
) -> Evaluation:
    """Measure a model on chunks, and its distance from `against`, in torch.

    Args:
        decoder: the model to judge.
        chunks: token ids, each chunk at least two.
        against: usually the float model; the same vocabulary.
        on_step: called after each layer of each model, and after each chunk's logits.
        origin: whether the chunks are computed as prompts, or as if they had been generated.
        positions: takes in what is found at each position.

    Raises:
        CheckpointError: the model says NaN.
        ConfigError: the two have different vocabularies.
    """
    models = [decoder] if against is None else [decoder, against]
    _require_same_vocabulary([each.checkpoint.config for each in models])
    streams = [_reference_log_probs(each, chunks, on_step, origin) for each in models]
    return _evaluate(streams, chunks, _STEP_TOKENS, on_step, Positions() if positions is None else positions)


def _native_log_probs(model: NativeModel, chunks: Chunks, step: int, generated: bool) -> Iterator[NDArray[Any]]:
    """Yield log p after all tokens of a chunk but the last, (R, V) float32."""
    model.allocate_cache(max(map(len, chunks)))
    for chunk in chunks:
        for at in range(0, len(chunk) - 1, step):
            tokens = chunk[at:-1][:step]
            pages = range(-(-(at + len(tokens)) // PAGE))
            logits, _ = model.forward([Chunk(tokens, at, pages, 0 if generated else len(chunk), wants_all=True)])
            yield log_softmax(logits)


def _reference_log_probs(
    decoder: Decoder, chunks: Chunks, on_layer: Callable[[], None], origin: Literal["prompt", "generated"]
) -> Iterator[NDArray[Any]]:
    """Yield the same, all chunks having gone through one layer after the other before."""
    from torch import log_softmax

    hidden_TE, head, begin = decoder.hidden_states(chunks, on_layer, origin), decoder.head(), 0
    for chunk in chunks:
        for at in range(0, len(chunk) - 1, _STEP_TOKENS):
            rows = slice(begin + at, begin + min(at + _STEP_TOKENS, len(chunk) - 1))
            yield log_softmax(head(hidden_TE[rows], origin), -1).numpy()
        begin += len(chunk)


@dataclass
class Positions:
    """What is kept of each position, in pieces; all but `nll` and `top` stay empty without a model to compare with.

    Attributes:
        nll: -log p of the token that follows, float64.
        top: the likeliest next token, int64.
        nll_against: as nll, of the other model.
        top_against: as top, of the other model.
        kl: float64.
    """

    nll: list[NDArray[Any]] = field(default_factory=list)
    top: list[NDArray[Any]] = field(default_factory=list)
    nll_against: list[NDArray[Any]] = field(default_factory=list)
    top_against: list[NDArray[Any]] = field(default_factory=list)
    kl: list[NDArray[Any]] = field(default_factory=list)

    def add(self, log_probs: Sequence[NDArray[Any]], following: Sequence[int]) -> None:
        """Take in some positions: log p, (R, V), of one model or two, and the tokens that follow."""
        rows = np.arange(len(following))
        places = ((self.nll, self.top), (self.nll_against, self.top_against))
        for (nll, top), of_model in zip(places, log_probs, strict=False):
            nll.append(-of_model[rows, following].astype(np.float64))
            top.append(of_model.argmax(1))
        if len(log_probs) > 1:
            judged, float_model = log_probs
            self.kl.append((np.exp(float_model) * (float_model - judged)).sum(1, dtype=np.float64))

    def average(self, chunks: int) -> Evaluation:
        """Return what was measured.

        Raises:
            CheckpointError: a likelihood is NaN.
        """
        nll_T = np.concatenate(self.nll)
        nll = float(nll_T.mean())
        if math.isnan(nll):
            raise CheckpointError("log-likelihood", got="NaN", expected="a number", action="The weights are damaged.")
        if not self.kl:
            return Evaluation(nll, _exp(nll), len(nll_T), chunks)
        kl_T = np.concatenate(self.kl)
        return Evaluation(
            nll,
            _exp(nll),
            len(nll_T),
            chunks,
            ppl_against=_exp(float(np.concatenate(self.nll_against).mean())),
            kl_mean=float(kl_T.mean()),
            kl_p99=float(np.sort(kl_T)[math.ceil(0.99 * len(kl_T)) - 1]),
            top1_agreement=float((np.concatenate(self.top) == np.concatenate(self.top_against)).mean()),
        )


def _evaluate(
    streams: Sequence[Iterator[NDArray[Any]]],
    chunks: Chunks,
    step: int,
    on_chunk: Callable[[], None],
    found: Positions,
) -> Evaluation:
    """Average over all positions of the chunks, of which each model's log p come in steps of so many."""
    for chunk in chunks:
        for at in range(0, len(chunk) - 1, step):
            found.add([next(stream) for stream in streams], chunk[at + 1 : at + 1 + step])
        on_chunk()
    return found.average(len(chunks))


def log_softmax(logits_RV: NDArray[Any]) -> NDArray[Any]:
    """Return log p, (R, V) float32; sums are float64."""
    shifted: NDArray[Any] = logits_RV - logits_RV.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return shifted


def _require_same_vocabulary(configs: Sequence[ModelConfig]) -> None:
    """Refuse to compare models of different vocabularies: the first is the one that is judged."""
    ours, theirs = configs[0].vocab_size, configs[-1].vocab_size
    if ours != theirs:
        raise ConfigError("vocabulary of `against`", got=theirs, expected=ours, action="Give the float original.")


def _exp(nll: float) -> float:
    """Return e**nll, infinity past what a float holds."""
    try:
        return math.exp(nll)
    except OverflowError:  # past 709 nats a token: the weights are damaged, and the number should say so
        return math.inf


def default_text() -> str:
    """Return the essays that ship with the package: enough for 12 chunks of 512 tokens of most vocabularies."""
    return files("eightfold.data").joinpath("evaluation.txt").read_text(encoding="utf-8")


def read_evaluation_text(path: Path) -> str:
    """Read a text as it stands; of a large one, the beginning; of rows of JSON, their texts, with a blank line between.

    Raises:
        InputError: no regular file, unreadable, not text, empty, or a row of JSON without text.
    """
    text, _ = read_text(path, "text", _TEXT_BYTES, cuts=True)
    if begins_as_json(text):
        text = "\n\n".join(map(plain_text, read_rows(path, title="text")))
    if not text.strip():
        raise InputError("text", where=path, got="nothing", expected="some words")
    return text


def cut_chunks(token_ids: Sequence[int], chunks: int, chunk_len: int) -> list[list[int]]:
    """Return the first chunks of equal length, at most as many as the text fills.

    Raises:
        InputError: the text does not fill a single chunk.
        ConfigError: a chunk of fewer than two tokens predicts nothing.
    """
    if chunk_len < 2 or chunks < 1:
        raise ConfigError("chunks", got=f"{chunks} of {chunk_len} tokens", expected="at least 1 of at least 2 tokens")
    available = min(chunks, len(token_ids) // chunk_len)
    if available < 1:
        raise InputError(
            "text",
            got=f"{len(token_ids)} tokens",
            expected=f"at least one chunk of {chunk_len}",
            action="Lower `chunk_len`.",
        )
    return [list(token_ids[i * chunk_len : (i + 1) * chunk_len]) for i in range(available)]
