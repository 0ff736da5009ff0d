"""Losses of groups: against what quantizing one group really costs, and after a stop."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from eightfold.families import input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import Journal
from eightfold.model.reference.decoder import Batch, GroupCall, in_parts
from eightfold.model.reference.load import Decoder
from eightfold.progress import silent
from eightfold.quant.hidden import BackgroundSync
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe, Target
from eightfold.quant.search import Question, Search
from eightfold.quant.sensitivity import captured_groups
from eightfold.quant.within import find_losses
from eightfold.scheme import QuantType
from tests.conftest import token_samples, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(24)


def recipe(target: Target = Target.CPU, scheme: QuantType = QuantType.W8A8) -> Recipe:
    return Recipe(scheme, target=target, anti_outlier=AntiOutlier.SMOOTH, act_method=ActMethod.EXTREMES)


def question(model: Path, **choices) -> Question:
    return Question(Checkpoint.open(model), recipe(**choices), SAMPLES, False, silent)


def losses(asked: Question, folder: Path) -> dict[tuple[int, str, str], float]:
    folder.mkdir(exist_ok=True)
    with closing(Journal(folder)) as journal:
        found = find_losses(asked, folder, journal, {})
    return {(each.layer, each.group, kind): loss for each in found.groups for kind, loss in each.loss.items()}


class _OneQuantized:
    def __init__(self, captured, quantized):
        self._captured, self._quantized = captured, quantized

    def __call__(self, x_TK, batch):
        self._captured(x_TK, batch)
        changes = self._quantized.change(self._captured, batch)
        outputs = zip(self._captured.outputs, changes, strict=True)
        return in_parts(tuple(y + change for y, change in outputs), self._captured.group.parts)


@torch.no_grad()
def measured(asked: Question, folder: Path) -> dict[tuple[int, str, str], float]:
    """Return the KL divergence at the model's end with one group quantized, by layer, group and type."""
    journal = Journal(folder)
    with BackgroundSync() as sync:
        kept = Search(asked, folder, journal, sync)
        decoder, config = Decoder(asked.checkpoint), asked.checkpoint.config
        batch = Batch.of([len(piece) for piece in asked.pieces], decoder.turns())
        x = decoder.embed([token for piece in asked.pieces for token in piece])
        streams: dict[tuple[int, str, str], torch.Tensor] = {}
        for layer_idx in range(config.num_layers):
            captured = captured_groups(decoder, layer_idx)
            layer = kept.float_block(layer_idx, captured)
            streams = {key: layer(states, batch) for key, states in streams.items()}
            for kind, groups in kept.quantized(layer_idx).items():
                for at, group in enumerate(input_groups(config, layer_idx)):
                    calls: list[GroupCall] = list(captured)
                    calls[at] = _OneQuantized(captured[at], groups[group.title])
                    streams[layer_idx, group.title, kind] = kept.float_block(layer_idx, calls)(x, batch)
            x = layer(x, batch)
    journal.close()
    head = decoder.head()
    p = head(x).double().log_softmax(-1)
    return {
        key: float((p.exp() * (p - head(states).double().log_softmax(-1))).sum(-1).mean())
        for key, states in streams.items()
    }


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_losses_are_those_of_quantizing_one_group(tmp_path, architecture):
    from tests.conftest import tiny_config

    asked = question(write_model(tmp_path / "float", tiny_config(architecture, vocab_size=320)))
    found = losses(asked, tmp_path / "search")
    real = measured(asked, tmp_path / "search")
    pairs = [(found[key], real[key]) for key in real]
    assert len(pairs) == 2 * 4 * 3
    estimated, exact = (list(each) for each in zip(*pairs, strict=True))
    correlation = torch.corrcoef(torch.stack([ranks(estimated), ranks(exact)]))[0, 1]
    assert correlation >= 0.9
    assert sum(estimated) == pytest.approx(sum(exact), rel=0.35)
    assert all(loss == 0 for key, loss in found.items() if key[2] == "FLOAT")


def test_a_search_goes_on_where_it_stopped(tmp_path, float_model, monkeypatch):
    asked = question(float_model)
    whole = losses(asked, tmp_path / "whole")
    taken: list[str] = []
    step = Search._step

    def stopping(self, name, take):
        taken.append(name)
        if len(taken) == 5:
            raise KeyboardInterrupt
        step(self, name, take)

    monkeypatch.setattr(Search, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        losses(asked, tmp_path / "stopped")
    assert taken == ["forward 0", "forward 1", "ends", "backward 1", "backward 0"]
    forward = Search._forward
    monkeypatch.setattr(Search, "_step", step)
    monkeypatch.setattr(Search, "_forward", lambda *_: pytest.fail("taken again"))
    assert losses(asked, tmp_path / "stopped") == whole
    monkeypatch.setattr(Search, "_forward", forward)


def test_a_damaged_search_starts_over(tmp_path, float_model, monkeypatch):
    asked = question(float_model)
    whole = losses(asked, tmp_path / "search")
    (tmp_path / "search" / "statistics-00001-W8A8").write_bytes(b"damage")
    assert losses(asked, tmp_path / "search") == whole


def test_types_are_those_of_the_target(tmp_path, float_model):
    found = losses(question(float_model, target=Target.MINDIE), tmp_path / "search")
    assert {kind for _, _, kind in found} == {"W8A8", "FLOAT"}
