"""Perplexity of a model, and its distance from another one, on the same text.

    nll = - mean_t log p(x_t | x_<t)      ppl = exp(nll)
    KL  = mean_t sum_v p(v) (log p(v) - log q(v))        p: the float model, q: the one being judged; nats

The text is tokenized once, without special tokens, and cut into chunks of equal length; each chunk stands alone, so
a chunk of C tokens gives C - 1 predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eightfold.evaluate.evaluation import Evaluation, Tally, require_same_vocabulary
from eightfold.model.reference.decoder import Origin
from eightfold.model.reference.load import Decoder, Head

# Tokens whose logits are held at a time: 128 x 128,256 float32 are 66 MB.
_HEAD_TOKENS = 128


@torch.inference_mode()
def evaluate(
    decoder: Decoder,
    chunks: Sequence[Sequence[int]],
    against: Decoder | None = None,
    on_step: Callable[[], None] = lambda: None,
    origin: Origin = "prompt",
) -> Evaluation:
    """Measure a model on chunks of equal length, and its distance from `against`.

    Args:
        decoder: the model to judge.
        chunks: token ids, each chunk at least two.
        against: usually the float model; the same vocabulary.
        on_step: called after each layer of each model, and after each chunk's logits.
        origin: whether the chunks are computed as prompts, or as if they had been generated.
    """
    models = [decoder]
    if against is not None:
        require_same_vocabulary([decoder.checkpoint.config, against.checkpoint.config])
        models.append(against)
    hidden_TE = [model.hidden_states(chunks, on_step, origin) for model in models]
    heads = [model.head() for model in models]
    tally = Tally()
    chunk_len = len(chunks[0])
    for i, chunk in enumerate(chunks):
        targets = torch.tensor(chunk[1:], dtype=torch.int64)
        for at in range(0, chunk_len - 1, _HEAD_TOKENS):
            end = min(at + _HEAD_TOKENS, chunk_len - 1)
            rows = slice(i * chunk_len + at, i * chunk_len + end)
            log_probs = [_log_probs(head, x[rows], origin) for head, x in zip(heads, hidden_TE, strict=True)]
            _add(tally, log_probs, targets[at:end])
        on_step()
    return Evaluation.of(len(chunks), tally)


def _log_probs(head: Head, hidden_TE: Tensor, origin: Origin) -> Tensor:
    return torch.log_softmax(head(hidden_TE, origin), dim=-1)


def _add(tally: Tally, log_probs: list[Tensor], targets_T: Tensor) -> None:
    picked = [logp.gather(1, targets_T[:, None])[:, 0].double() for logp in log_probs]
    for kept, of_model in zip((tally.nll, tally.nll_against), picked, strict=False):
        kept.append(-of_model.numpy())
    if len(log_probs) > 1:
        judged, float_model = log_probs
        tally.kl.append((float_model.exp() * (float_model - judged)).sum(-1).double().numpy())
        tally.same_top.append((judged.argmax(-1) == float_model.argmax(-1)).numpy())
