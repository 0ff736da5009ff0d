"""How types are chosen again after a proof: with models that lose a multiple of what is predicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eightfold.errors import ConfigError
from eightfold.quant import within
from eightfold.quant.analysis import GroupLoss
from eightfold.quant.choice import choose, total_bytes, total_loss
from eightfold.quant.outcome import Proof
from eightfold.quant.recipe import Recipe
from eightfold.quant.within import ATTEMPTS, Within, held_out
from eightfold.scheme import QuantType

GROUPS = tuple(
    GroupLoss(at, "g", (f"l{at}",), {"W8A8": 100, "FLOAT": 200}, {"W8A8": 0.001 * (at + 1), "FLOAT": 0.0})
    for at in range(20)
)


class Steps:
    """A journal."""

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {}

    def append(self, entry: dict[str, Any]) -> None:
        self.steps[entry["step"]] = entry


def run(monkeypatch: pytest.MonkeyPatch, limit: float, truth: float, journal: Steps) -> tuple[list[str], int]:
    """Return the types that are taken at last, and how many models were made."""
    made: list[Any] = []
    question = SimpleNamespace(recipe=Recipe(QuantType.W8A8), checkpoint=None, mode="symmetric")
    monkeypatch.setattr(Within, "_modules", lambda self, groups, types: tuple((kind, QuantType.W8A8) for kind in types))
    monkeypatch.setattr(Within, "_analysis", lambda self, findings, types, outcome: types)
    monkeypatch.setattr(
        within, "divergence", lambda source, types, held, mode: Proof(truth * total_loss(GROUPS, types), 1.0, 10)
    )

    def make(recipe: Recipe, prove: Any) -> Any:
        made.append(recipe)
        return prove([pattern for pattern, _ in recipe.modules])

    asked = Within(question, [], limit, GROUPS, lambda text: None)  # type: ignore[arg-type]
    found: Any = asked.choose_and_prove(SimpleNamespace(groups=GROUPS), journal, make)  # type: ignore[arg-type]
    return found[1], len(made)


@pytest.mark.parametrize("truth", [0.2, 0.5, 1.0, 1.5, 4.0])
def test_the_limit_is_kept_with_the_bytes_that_it_needs(monkeypatch, truth):
    types, made = run(monkeypatch, 0.05, truth, Steps())
    assert truth * total_loss(GROUPS, types) <= 0.05
    best = choose(GROUPS, 0.05 / truth)
    assert total_bytes(GROUPS, types) <= 1.06 * total_bytes(GROUPS, best)
    assert made <= ATTEMPTS


def test_what_was_proved_before_a_stop_is_not_made_again(monkeypatch):
    journal = Steps()
    types, made = run(monkeypatch, 0.05, 4.0, journal)
    again, remade = run(monkeypatch, 0.05, 4.0, journal)
    assert again == types
    assert (made, remade) == (2, 1)


def test_a_limit_that_nothing_reaches_is_refused_with_the_best(monkeypatch):
    with pytest.raises(ConfigError, match=r"what was reached: KL 0\.00075 predicted, with one group"):
        run(monkeypatch, 1e-9, 1.0, Steps())
    with pytest.raises(ConfigError, match="what was reached: KL inf proved, with"):
        run(monkeypatch, 0.05, float("inf"), Steps())


def test_samples_are_held_out():
    samples = [[at] for at in range(17)]
    rest, held = held_out(samples)
    assert held == [[7], [15]]
    assert sorted([*rest, *held]) == samples
    assert held_out([[1], [2]]) == ([[1]], [[2]])
