"""quantize_within(): the fewest bytes a token that keep a KL divergence, chosen by loss and proved before OUT appears.

    held out     every 8th calibration sample: no range, scale or loss is taken from it
    search       losses of the groups (search.py), in .OUT.search beside OUT, where a killed run goes on
    choose       types by predicted loss (choice.py)
    quantize     as with a recipe that names these types; the written tensors are read back and compared with the float
                 model on the held-out samples; a model that misses is removed, and a tighter limit is chosen by

Predictions of single groups add up to one for the model up to a factor; what was proved tells the factor.

Letters: R positions, V vocabulary.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eightfold.errors import ConfigError, OutputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import Entry, Journal, closing_line, read_entries
from eightfold.model.reference.attention import soft_cap
from eightfold.model.reference.linear import DynamicMode, float_linear
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor
from eightfold.progress import Progress, silent
from eightfold.quant.analysis import Analysis, Choice, GroupLoss
from eightfold.quant.budget import budget_for, require_search_fits
from eightfold.quant.choice import choose, require_known_losses, total_bytes, total_loss
from eightfold.quant.hidden import BackgroundSync
from eightfold.quant.identity import identity
from eightfold.quant.outcome import Outcome, Proof, samples_facts
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.plan import assign_types
from eightfold.quant.recipe import Recipe, Samples
from eightfold.quant.search import Damaged, Findings, Question, Search
from eightfold.scheme import SCHEMES, QuantType
from eightfold.values import size_text

# So many models are made at most.
ATTEMPTS = 4

# Every so many samples one is held out.
HOLD_OUT = 8

# A limit is chosen by a little less, so that the next attempt does not miss by a hair.
_MARGIN = 0.97

# A model is made anew only for so much fewer bytes.
_WORTH = 0.97

# So much of what the sum of losses predicts is usually proved, at most: docs/accuracy.md.
USUAL = 0.75

_FLOAT = QuantType.FLOAT.value

_ROWS_AT_ONCE, _POSITIONS = 4096, 64


class Missed(ConfigError):
    """A model loses more than it may."""

    def __init__(self, proof: Proof, limit: float) -> None:
        super().__init__("max_kl", got=f"{proof.kl:.5f} on held-out samples", expected=f"at most {limit:g}")
        self.proof = proof


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Return the samples for calibration, and those for the proof."""
    step = min(HOLD_OUT, len(samples))
    rest = [sample for at, sample in enumerate(samples) if at % step != step - 1]
    return rest, [sample for at, sample in enumerate(samples) if at % step == step - 1]


@torch.inference_mode()
def divergence(source: Checkpoint, made: Checkpoint, samples: Samples, mode: DynamicMode) -> Proof:
    """Return the mean KL divergence of a model from the float one, both with the same float head, on whole samples.

    One layer of one model is in memory at a time, and some rows of the head.
    """
    decoders = Decoder(source), Decoder(made, dynamic=mode)
    states = [decoder.final_norm()(decoder.hidden_states(samples)) for decoder in decoders]
    keep = torch.cat([torch.arange(len(sample)) < len(sample) - 1 for sample in samples])
    p_TE, q_TE = (each[keep] for each in states)
    kl, same = 0.0, 0
    for at in range(0, len(p_TE), _POSITIONS):
        rows = slice(at, at + _POSITIONS)
        p, q = (_logits(source, each[rows]).double().log_softmax(-1) for each in (p_TE, q_TE))
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Proof(kl / len(p_TE), same / len(p_TE), len(p_TE))


def proof_seconds(source: Checkpoint, samples: Samples) -> float:
    """Return how long the proof of a model like this one takes."""
    began = time.perf_counter()
    divergence(source, source, samples, "asymmetric")
    return time.perf_counter() - began


def _logits(checkpoint: Checkpoint, normed_RE: Tensor) -> Tensor:
    """Return logits, (R, V)."""
    config, name, found = checkpoint.config, checkpoint.head_weight(), []
    for row in range(0, config.vocab_size, _ROWS_AT_ONCE):
        weight = load_tensor(checkpoint, name)[row : row + _ROWS_AT_ONCE].to(torch.float32)
        found.append(float_linear(normed_RE, weight, None))
    checkpoint.release([name])
    return soft_cap(torch.cat(found, 1) * config.logits_multiplier, config.logits_softcap)


@contextmanager
def search_place(target: Path, head: dict[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """Open the folder beside OUT in which a search is kept, new or as an earlier run has left it; it stays on Ctrl-C.

    Raises:
        OutputError: it cannot be written, or another process has it.
    """
    path = target.absolute().parent / f".{target.name}.search"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = Journal(path)
    except OSError as error:
        got = "another process at work" if isinstance(error, BlockingIOError) else error.strerror or error
        raise OutputError(f"cannot write to {path}: {got}", action="Wait for it, or choose another OUT.") from None
    try:
        if journal.head != head:
            restart(path, journal, head)
        yield path, journal
    finally:
        journal.close()


def search_head(checkpoint: Checkpoint, recipe: Recipe, samples: Samples) -> Entry:
    """Return the first line of a search's journal: all that decides what is found, and so not the limit."""
    return {**identity(checkpoint, recipe, samples, layout={}), "command": "search"}


def restart(path: Path, journal: Journal, head: Mapping[str, Any]) -> None:
    """Forget what a search has found."""
    journal.clear()
    for file in path.iterdir():
        if file != journal.path:
            file.unlink()
    journal.append(head)


def find_losses(question: Question, path: Path, journal: Journal, head: Mapping[str, Any]) -> Findings:
    """Take all passes that an earlier run has not taken."""
    with BackgroundSync() as sync:
        try:
            search = Search(question, path, journal, sync)
        except Damaged:
            restart(path, journal, head)
            search = Search(question, path, journal, sync)
        return search.find()


class _Tried(NamedTuple):
    """A model that was made and removed."""

    types: list[str]
    proof: Proof
    nbytes: int  # of its linears


@dataclass(frozen=True)
class Within:
    """One quantization that has to keep a KL divergence.

    Attributes:
        question: about the model, with the samples that are not held out.
        held: the samples of the proof.
        limit: of the KL divergence, in nats.
        groups: their losses.
        tell: is told what is found, one line each.
    """

    question: Question
    held: Samples
    limit: float
    groups: tuple[GroupLoss, ...]
    tell: Callable[[str], None]

    def choose_and_prove(
        self, findings: Findings, journal: Journal, make: Callable[..., Outcome]
    ) -> tuple[Outcome, Analysis]:
        """Make models by the losses until one keeps the limit, and needs no more bytes than it has to.

        Raises:
            ConfigError: none does.
        """
        groups, factor, tried = findings.groups, USUAL, list[_Tried]()
        for attempt in range(ATTEMPTS):
            kept = [each for each in tried if each.proof.kl <= self.limit]
            types = choose(groups, self.limit * (_MARGIN if attempt else 1.0) / factor)
            if kept and (types is None or attempt == ATTEMPTS - 1 or not self._saves(types, kept[-1].types)):
                types = kept[-1].types
            if types is None or all(kind == _FLOAT for kind in types):
                break
            proof = self._proved(journal, attempt)
            if proof is None:
                recipe = replace(self.question.recipe, modules=self._modules(groups, types))
                accepts_any = bool(kept) or attempt == ATTEMPTS - 1
                try:
                    outcome = make(recipe, functools.partial(self._prove, types, groups, accepts_any))
                except Missed as missed:
                    proof = missed.proof
                    facts = [proof.kl, proof.top1, proof.tokens]
                    journal.append({"step": f"attempt {attempt} at {self.limit:g}", "proof": facts})
                else:
                    return outcome, self._analysis(findings, types, outcome)
            tried.append(_Tried(types, proof, total_bytes(groups, types)))
            how = "more than" if proof.kl > self.limit else "and fewer bytes may do for"
            self.tell(
                f"predicted {total_loss(groups, types) * factor:.4f}, proved {proof.kl:.4f}: {how} {self.limit:g}."
            )
            factor = self._factor(groups, types, proof)
        raise self._unreached(groups, tried)

    def _factor(self, groups: Sequence[GroupLoss], types: Sequence[str], proof: Proof) -> float:
        """Return by what predictions are multiplied, as a proof shows."""
        return proof.kl / max(total_loss(groups, types), 1e-12)

    def _saves(self, types: Sequence[str], than: Sequence[str]) -> bool:
        """Return whether a choice has so much fewer bytes than another that making the model anew is worth it."""
        sizes = [total_bytes(self.groups, each) for each in (types, than)]
        return sizes[0] <= _WORTH * sizes[1]

    def _proved(self, journal: Journal, attempt: int) -> Proof | None:
        """Return what an earlier run has proved of an attempt that missed."""
        entry = journal.steps.get(f"attempt {attempt} at {self.limit:g}")
        return None if entry is None else Proof(*entry["proof"])

    def _unreached(self, groups: Sequence[GroupLoss], tried: Sequence[_Tried]) -> ConfigError:
        """Return the refusal of a limit, with the best that was reached and its cost."""
        if tried:
            best = min(tried, key=lambda each: each.proof.kl)
            reached = f"KL {best.proof.kl:.3g} proved, with {size_text(best.nbytes)} of linears a token"
        else:
            int8 = [replace(group, loss={k: v for k, v in group.loss.items() if k != _FLOAT}) for group in groups]
            least = min((loss for group in int8 for loss in group.loss.values()), default=0.0)
            reached = f"KL {least * USUAL:.3g} predicted, with one group of linears int8"
        return ConfigError(
            "max_kl",
            got=f"{self.limit:g}, which nothing reached",
            expected=f"at least what was reached: {reached}",
            action="Give a larger one; the float model itself loses nothing.",
        )

    def _prove(self, types: Sequence[str], groups: Sequence[GroupLoss], accepts_any: bool, made: Checkpoint) -> Proof:
        """Measure a model. One that could do with fewer bytes misses too, unless all that keep the limit are taken."""
        proof = divergence(self.question.checkpoint, made, self.held, self.question.mode)
        if not proof.kl <= self.limit:
            raise Missed(proof, self.limit)
        if not accepts_any:
            fewer = choose(groups, self.limit * _MARGIN / self._factor(groups, types, proof))
            if fewer is not None and self._saves(fewer, types):
                raise Missed(proof, self.limit)
        return proof

    def _modules(self, groups: Sequence[GroupLoss], types: Sequence[str]) -> tuple[tuple[str, QuantType], ...]:
        """Return the types of linears that have another one than the recipe gives."""
        usual = assign_types(self.question.checkpoint.config, self.question.recipe)
        chosen = [(name, QuantType(kind)) for group, kind in zip(groups, types, strict=True) for name in group.linears]
        return tuple((name, kind) for name, kind in chosen if usual[name] is not kind)

    def _analysis(self, findings: Findings, types: Sequence[str], outcome: Outcome) -> Analysis:
        found = analysis_of(self.question, findings)
        proof = outcome.proof
        assert proof is not None
        return replace(
            found,
            out_bytes=outcome.nbytes,
            choices=tuple(choices_of(findings.groups, types)),
            kl=proof.kl,
            top1=proof.top1,
            held_out_tokens=proof.tokens,
        )


def choices_of(groups: Sequence[GroupLoss], types: Sequence[str]) -> Iterator[Choice]:
    """Yield the choice of every linear with its reason."""
    for group, kind in zip(groups, types, strict=True):
        others = [other for other in group.loss if other != QuantType.FLOAT.value]
        least = min(others, key=lambda other: group.loss[other], default="")
        if not others:
            reason = "asked for"
        elif kind == QuantType.FLOAT.value:
            reason = f"{least} would lose {group.loss[least]:.5f}"
        elif kind == others[0]:
            reason = f"loses {group.loss[kind]:.5f}"
        else:
            reason = f"loses {group.loss[kind]:.5f}; {others[0]} would lose {group.loss[others[0]]:.5f}"
        for name in group.linears:
            yield Choice(name, kind, reason)


def analysis_of(question: Question, findings: Findings) -> Analysis:
    """Return what was found before anything is chosen."""
    checkpoint, recipe = question.checkpoint, question.recipe
    return Analysis(
        model=checkpoint.directory.resolve().name,
        scheme=recipe.scheme.value,
        target=recipe.target.value if recipe.target else None,
        samples=len(question.samples),
        tokens=sum(map(len, question.samples)),
        float_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        groups=findings.groups,
        ranges=findings.ranges,
    )


def question_of(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples, memory: int | None, progress: Progress = silent
) -> Question:
    """Return the question about a model.

    Raises:
        CapacityError: the memory is too little.
    """
    budget = budget_for(checkpoint, recipe, samples)
    question = Question(checkpoint, recipe, samples, budget.spills(memory), progress)
    require_search_fits(checkpoint, recipe, question.pieces, memory, len(question.kinds) - 1)
    return question


def analyze(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples,
    folder: Path,
    *,
    memory: int | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Find the losses of a model's groups and the ranges of their inputs; tokens are named by their ids.

    Args:
        checkpoint: the float model.
        recipe: scheme, target and smoothing.
        samples: for calibration.
        folder: an empty one for what is kept meanwhile.
        memory: how much may be resident, in bytes; None for half of what is free.
        progress: who is told.
    """
    question = question_of(checkpoint, recipe, samples, memory, progress)
    journal = Journal(folder)
    try:
        return analysis_of(question, find_losses(question, folder, journal, {}))
    finally:
        journal.close()


def quantize_within(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    samples: Samples,
    limit: float,
    *,
    memory: int | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> tuple[Outcome, Analysis | None]:
    """Quantize so that the KL divergence on held-out samples stays within a limit, with the fewest bytes a token.

    Args:
        checkpoint: the float model.
        target: the directory to make.
        recipe: scheme, target and smoothing; types are chosen.
        samples: for calibration; some are held out for the proof.
        limit: in nats.
        memory: see quantize_checkpoint, as what follows.
        progress: who is told how far it is.
        tell: is told what was found, one line each.
        options: overwrite, part_bytes, legacy_names.

    Returns:
        What was done, and the losses by which it was chosen: None where OUT was complete already.

    Raises:
        ConfigError: something with which it does not go, or a limit that nothing reaches.
    """
    require_known_losses("max_kl", recipe, checkpoint.config)
    if len(samples) < 2:
        got = f"{len(samples)} calibration samples"
        action = "Give more calibration texts."
        raise ConfigError("max_kl", got=got, expected="at least 2, of which one is held out", action=action)
    rest, held = held_out(samples)
    asked = {"max_kl": limit, "held_out": samples_facts(held)}

    def make(chosen: Recipe, prove: Any) -> Outcome:
        return quantize_checkpoint(
            checkpoint, target, chosen, rest, memory=memory, progress=progress, asked=asked, prove=prove, **options
        )

    if (made := _made(target, asked, recipe)) is not None:
        return make(made, None), None
    question = question_of(checkpoint, recipe, rest, memory, progress)
    head = search_head(checkpoint, recipe, rest)
    with search_place(target, head) as (path, journal):
        findings = find_losses(question, path, journal, head)
        within = Within(question, held, limit, findings.groups, tell)
        try:
            found = within.choose_and_prove(findings, journal, make)
        except ConfigError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
    return found


def _made(target: Path, asked: Mapping[str, Any], recipe: Recipe) -> Recipe | None:
    """Return the recipe of a complete output that answers the same question; None where there is none."""
    entries = read_entries(target) if target.is_dir() else None
    if not entries or closing_line(entries) is None or entries[0].get("asked") != asked:
        return None
    names = {**SCHEMES, "float": QuantType.FLOAT}
    return replace(recipe, modules=tuple((name, names[kind]) for name, kind in entries[0]["recipe"]["modules"].items()))
