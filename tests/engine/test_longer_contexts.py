"""How far an engine looks back with rope types that are made for it, and that its longest sequence decides for all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from eightfold.errors import ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from tests.conftest import tiny_config, write_model
from tests.engine.models import Small, greedy, run, tokens

ORIGINAL = 64
DYNAMIC = {"type": "dynamic", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


def small(directory: Path, rope: dict[str, Any] | None, positions: int, longest: int) -> Small:
    config = tiny_config(rope_scaling=rope, max_position_embeddings=positions, torch_dtype="float32")
    source = write_model(directory / str(longest), config)
    return Small(source, load_model(Checkpoint.open(source), threads=1, longest=longest))


@pytest.mark.parametrize(
    ("rope", "positions", "context", "reach"),
    [
        (YARN, ORIGINAL, 4 * ORIGINAL, 4 * ORIGINAL),
        (DYNAMIC, ORIGINAL, ORIGINAL, 4 * ORIGINAL),
        (LONGROPE, 4 * ORIGINAL, 4 * ORIGINAL, 4 * ORIGINAL),
    ],
    ids=["yarn", "dynamic", "longrope"],
)
def test_every_length_that_may_be_asked_for(tmp_path, rope, positions, context, reach):
    for longest in (ORIGINAL, reach):
        model = small(tmp_path, rope, positions, longest)
        engine = model.engine(max_model_len=longest)
        prompts = [tokens(random.Random(at), longest - 20 * at - 9) for at in range(3)]
        for at, prompt in enumerate(prompts):
            engine.add_request(str(at), prompt, greedy(9))
        found = {name: answers[0].token_ids for name, answers in run(engine).items()}
        assert found == {str(at): model.answer(prompt, 9) for at, prompt in enumerate(prompts)}
    assert model.engine().max_model_len == context
    with pytest.raises(ConfigError, match=f"got {reach + 1}, expected at most {reach}, which is all this model can"):
        model.engine(max_model_len=reach + 1)


def test_dynamic_scaling_is_plain_up_to_the_models_own_context(tmp_path):
    plain = small(tmp_path / "plain", None, ORIGINAL, ORIGINAL)
    scaled, far = (small(tmp_path / "scaled", DYNAMIC, ORIGINAL, longest) for longest in (ORIGINAL, 4 * ORIGINAL))
    prompts = [tokens(random.Random(seed), 40) for seed in range(3)]
    assert [scaled.answer(prompt, 20) for prompt in prompts] == [plain.answer(prompt, 20) for prompt in prompts]
    assert [far.answer(prompt, 20) for prompt in prompts] != [plain.answer(prompt, 20) for prompt in prompts]


def test_longrope_has_short_factors_up_to_the_original_context(tmp_path):
    alike = {**LONGROPE, "long_factor": LONGROPE["short_factor"]}
    short, long = (small(tmp_path / "a", LONGROPE, 4 * ORIGINAL, longest) for longest in (ORIGINAL, ORIGINAL + 1))
    always_short = small(tmp_path / "b", alike, 4 * ORIGINAL, ORIGINAL + 1)
    prompts = [tokens(random.Random(seed), 40) for seed in range(3)]
    expected = [always_short.answer(prompt, 20) for prompt in prompts]
    assert [short.answer(prompt, 20) for prompt in prompts] == expected
    assert [long.answer(prompt, 20) for prompt in prompts] != expected
