"""A draft model: answers stay the same, whatever it guesses; what is guessed and when; what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eightfold import LLM
from eightfold.engine import speculate
from eightfold.engine.draft import Found
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CapacityError, ConfigError, InputError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE, Chunk
from eightfold.parallel.world import World
from tests.conftest import tiny_config, write_model
from tests.engine.models import CONTEXT, answers, greedy, run, step, tokens
from tests.refusal import error_line

NOTHING = Found()
SIZES: dict[str, Any] = {"max_position_embeddings": CONTEXT, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A model with the same vocabulary that says other things, and looks back on less."""
    sizes = {**SIZES, "hidden_size": 16, "max_position_embeddings": 200}
    return write_model(tmp_path_factory.mktemp("stranger") / "model", tiny_config(**sizes))


@pytest.fixture(params=["friend", "stranger"])
def small_model(request, small, stranger) -> Path:
    """A model that is often right, and one that never is."""
    return small("float").directory if request.param == "friend" else stranger


def drafting(of, model: Path, count: int = 4, pages: int | None = None, **limits):
    """Return an engine with a draft model, and memory for so many pages of both."""
    if pages is not None:
        small = load_model(Checkpoint.open(model), threads=1)
        limits["kv_memory"] = pages * (of.page_bytes + small.page_bytes)
    return of.engine(draft_model=model, draft_tokens=count, **limits)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("w8a8", {}),
        ("mix", {"pages": 6}),
        ("faquant", {"speculate": 3}),
        ("w8a8", {"prefix_caching": False, "count": 1}),
    ],
)
def test_greedy_answers_are_those_of_the_model_alone(small, small_model, name, limits):
    """Eight sequences with common beginnings, over block boundaries, with memory for some of them."""
    of, rng = small(name), random.Random(4)
    engine = drafting(of, small_model, **limits)
    common = tokens(rng, 140)
    prompts = [[*common, *tokens(rng, rng.randrange(1, 40))] if at % 2 else tokens(rng, 100 + at) for at in range(8)]
    found = answers(engine, {str(at): (prompt, greedy(50)) for at, prompt in enumerate(prompts)})
    for at, prompt in enumerate(prompts):
        assert found[str(at)] == [of.answer(prompt, 50)]
    stats = engine.stats
    assert stats.model_drafted > 100
    assert stats.model_accepted <= stats.model_drafted
    assert stats.passes <= stats.generated_tokens
    assert bool(stats.preemptions) == ("pages" in limits)


def test_right_guesses_save_steps(small):
    of = small("w8a8")
    engine = drafting(of, of.directory)
    assert answers(engine, {"0": ([1, 2, 3], greedy(100))})["0"] == [of.answer([1, 2, 3], 100)]
    assert engine.stats.model_accepted > 0.9 * engine.stats.model_drafted
    assert engine.stats.tokens_per_pass > 4


def test_a_right_guess_of_the_end_is_a_right_one(small):
    of = small("w8a8")
    prompt = [1, 2, 3]
    expected = of.answer(prompt, 100)
    at = next(at for at in range(2, 100) if expected[at] not in expected[:at])
    engine = drafting(of, of.directory, count=at)
    engine.add_request("it", prompt, SamplingParams(temperature=0.0, max_tokens=100, stop_token_ids=(expected[at],)))
    (answer,) = run(engine)["it"]
    assert answer.finish_reason == "stop"
    assert engine.stats.model_accepted == engine.stats.model_drafted == at


def test_answers_with_a_seed_stay_the_same(small, small_model):
    of = small("w8a8")
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=3, n=3, max_tokens=40, logprobs=2, repetition_penalty=1.1)
    prompt = tokens(random.Random(1), 120)
    plain, guessing = of.engine(), drafting(of, small_model)
    expected, found = [run_one(engine, prompt, params) for engine in (plain, guessing)]
    assert found == expected
    assert guessing.stats.model_drafted > 0


def run_one(engine, prompt, params):
    engine.add_request("it", prompt, params)
    return [(each.token_ids, each.logprobs, each.text) for each in run(engine)["it"]]


def test_the_distribution_of_random_answers_is_the_models(small):
    """Chi-square of the third token after a first and a second, over 900 answers that guesses were made for."""
    of = small("w8a8")
    engine = drafting(of, small("float").directory, count=2, max_num_seqs=60, max_batched_tokens=500)
    forward = engine._draft._forward

    def narrowed(*args, **kwargs):
        found, margins = forward(*args, **kwargs)
        return [token % 4 for token in found], margins

    engine._draft._forward = narrowed
    bias = dict.fromkeys(range(4), 100.0)  # a vocabulary of four
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(15):
        params = SamplingParams(temperature=1.0, seed=seed, n=60, max_tokens=3, ignore_eos=True, logit_bias=bias)
        engine.add_request("it", [7, 8, 9], params)
        counts.update(tuple(each.token_ids) for each in run(engine)["it"])
    assert engine.stats.model_accepted > 100
    of.alone.allocate_cache(PAGE)
    probabilities = {}
    for first in range(4):
        for second in range(4):
            logits, _ = of.alone.forward([Chunk([7, 8, 9, first, second], 0, [0], 3, wants_all=True)])
            p = np.exp(logits[2:, :4] - logits[2:, :4].max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            for third in range(4):
                probabilities[first, second, third] = p[0, first] * p[1, second] * p[2, third]
    total = sum(counts.values())
    assert total == 900
    chi_square = sum((counts[each] - total * p) ** 2 / (total * p) for each, p in probabilities.items())
    assert chi_square < 103  # of 63 degrees of freedom: the 99.9th percentile


def test_answers_end_at_stop_strings_and_keep_to_their_forms(small):
    of = small("w8a8")
    prompt = [1, 2, 3]
    text = of.engine().tokenizer.decode(of.answer(prompt, 40))
    stop = text[5:7]
    for params in (
        greedy(40, stop=[stop]),
        SamplingParams(temperature=0.0, max_tokens=30, structured=StructuredOutput(regex="[0-9]{4,9}(ab)*x")),
        SamplingParams(
            temperature=1.0, seed=1, max_tokens=30, structured=StructuredOutput(json_schema='{"type": "integer"}')
        ),
    ):
        expected = run_one(of.engine(), prompt, params)
        engine = drafting(of, small("float").directory)
        assert run_one(engine, prompt, params) == expected
        assert engine.stats.model_drafted > 0


def test_requests_may_be_aborted_between_guesses(small, small_model):
    of, rng = small("w8a8"), random.Random(2)
    engine = drafting(of, small_model, pages=7)
    prompts = {str(at): tokens(rng, 100 + 20 * at) for at in range(6)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(60))
    found = {}
    for at in range(300):
        if at in (3, 6, 9):
            engine.abort(str(at // 3))
        for output in step(engine):
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids
        if not engine.has_unfinished:
            break
    assert set(found) == {"0", "4", "5"}
    for name, token_ids in found.items():
        assert token_ids == of.answer(prompts[name], 60)


def test_what_is_cached_of_a_prompt_the_draft_model_does_not_compute_again(small):
    of = small("w8a8")
    engine = drafting(of, of.directory)
    rows = []
    likeliest = engine._draft.model.likeliest
    engine._draft.model.likeliest = lambda chunks: (rows.append(len(chunks[0].token_ids)), likeliest(chunks))[1]
    prompt = tokens(random.Random(3), 2 * PAGE + 10)
    first = answers(engine, {"0": (prompt, greedy(8))})
    assert max(rows) == 64  # of the step's budget: the prompt came in pieces
    assert sum(rows) > 2 * PAGE
    rows.clear()
    assert answers(engine, {"0": (prompt, greedy(8))}) == first
    assert sum(rows) < PAGE


class Times:
    """In place of draft.StepTimes."""

    def __init__(self, one: float, more: float = 0.0) -> None:
        self._one, self._more = one, more

    def __call__(self, rows: float) -> float:
        return self._one + self._more * (rows - 1)

    def note(self, rows: int, seconds: float) -> None:
        pass


def timed(of, model: Path):
    """Return an engine whose large model takes 1 for a step and 0.1 for a further row; the small one 0.3 and 0.01."""
    engine = of.engine(draft_model=model, max_num_seqs=32, max_batched_tokens=600)
    engine._draft.large_times, engine._draft._times = Times(1.0, 0.1), Times(0.3, 0.01)
    return engine


class TestHowManyAreGuessed:
    @pytest.fixture
    def guessed(self, small):
        def count(sequences: int, odds: float, found: Found = NOTHING, prompt_len: int = 4):
            engine = timed(small("w8a8"), small("float").directory)
            engine._draft._odds = odds
            for at in range(sequences):
                engine.add_request(str(at), [at, *[7] * (prompt_len - 1)], greedy(20))
            step(engine)
            model, plan = engine._draft, engine.scheduler.running
            able = [(sequence, at, model._reach(sequence)) for at, sequence in enumerate(plan)]
            wanted = model._best(able, [found] * len(plan), 500, len(plan))
            return [each for _, each in wanted]

        return count

    def test_one_sequence(self, guessed):
        # A guess takes 0.4. With p = 0.3 a step would give 1.3 tokens in 1.4.
        assert guessed(1, 0.3) == []
        # p = 0.6: 1.6 / 1.4 > 1, 1.96 / 1.8 is less.
        assert guessed(1, 0.6) == [1]
        # p = 0.9: (1 - 0.9^(K + 1)) / 0.1 / (1 + 0.4 K) is largest at K = 4.
        assert guessed(1, 0.9) == [4]
        assert guessed(1, 1.0) == [8]

    def test_many_sequences_use_the_machine_without_guesses(self, guessed):
        assert guessed(20, 0.6) == []
        assert guessed(20, 1.0) == [8] * 20

    def test_the_longer_expected_guess_wins(self, guessed):
        assert guessed(1, 0.6, Found(2, 1.9)) == []
        assert guessed(1, 0.6, Found(1, 0.2)) == [1]

    def test_a_long_prompt_is_only_computed_for_an_answer_that_is_long_enough(self, guessed):
        assert guessed(1, 0.9, prompt_len=100) == [4]
        assert guessed(1, 0.9, prompt_len=1000) == []


def test_guessing_ends_where_the_small_model_is_unsure(small):
    of = small("w8a8")
    engine = timed(of, small("float").directory)
    model = engine._draft
    model._odds, likeliest = 0.9, model.model.likeliest
    margins = iter([2.0, 2.0, 1.2, 2.0, 2.0, 0.1])
    model.model.likeliest = lambda chunks: (likeliest(chunks)[0], np.full(len(chunks), next(margins), np.float32))
    engine.add_request("0", [1, 2, 3], greedy(40))
    step(engine)
    step(engine)
    # A guess takes 0.4 of a time that gives 1.575 tokens: it has to be right with p = 0.63. After two that are sure,
    # 0.97^2 * 0.68 * 0.9 is less than that.
    assert engine.stats.model_drafted == 3


def test_one_that_guesses_wrong_falls_silent_and_is_tried_again(small, stranger):
    engine = timed(small("w8a8"), stranger)
    engine.add_request("0", [1, 2, 3], greedy(150))
    when = []
    for at in range(150):
        before = engine.stats.model_drafted
        step(engine)
        if engine.stats.model_drafted > before:
            when.append(at)
    assert 2 < len(when) < 15
    assert when[-1] > 60


def test_times_lie_between_what_was_measured_and_follow(small, monkeypatch):
    monkeypatch.setattr(speculate, "_seconds", lambda _, chunk: {1: 1.0, 4: 2.5, 8: 2.5}[len(chunk.token_ids)])
    times = speculate.StepTimes(small("w8a8").alone, (1, 4, 8))
    assert [times(rows) for rows in (1, 2, 3.5, 6, 12)] == [1.0, 1.5, 2.25, 2.5, 2.5]
    for _ in range(300):
        times.note(2, 3.0)
    assert times(1) == pytest.approx(2.0, rel=0.01)


class TestRefusals:
    def test_another_vocabulary(self, small, stranger, tmp_path):
        other = write_model(tmp_path / "other", tiny_config(**SIZES))
        path = other / "tokenizer.json"
        raw = json.loads(path.read_text())
        vocab = raw["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        path.write_text(json.dumps(raw))
        with pytest.raises(InputError) as caught:
            small("w8a8").engine(draft_model=other)
        assert str(caught.value) == (
            f"draft_model in {other}: got another vocabulary: token 'a' has id {vocab['a']}, "
            f"expected id {vocab['b']}, as in the model (2 tokens differ). Choose a model of the same family."
        )

    def test_a_larger_one(self, small, tmp_path):
        large = write_model(tmp_path / "large", tiny_config(**{**SIZES, "intermediate_size": 4800}))
        with pytest.raises(ConfigError, match="draft_model: got a model of 1 million weights, expected at most 0 mil"):
            small("w8a8").engine(draft_model=large)

    @pytest.mark.parametrize("command", ["run", "bench", "serve", "LLM"])
    def test_before_the_model_is_loaded(self, cli, small, tmp_path, monkeypatch, command):
        from eightfold.model.native import load

        large = write_model(tmp_path / "large", tiny_config(**{**SIZES, "intermediate_size": 4800}))
        monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("something was loaded"))
        if command == "LLM":
            with pytest.raises(ConfigError, match="draft_model: got a model of 1 million"):
                LLM(small("w8a8").directory, draft_model=large)
            return
        more = {"run": ("--prompt", "a"), "bench": (), "serve": ("--port", 0)}[command]
        message = error_line(cli(command, small("w8a8").directory, "--draft-model", large, *more))
        assert message.startswith("--draft-model: got a model of 1 million weights, expected at most 0 million")

    def test_texts_of_bench_beyond_the_context(self, cli, small, stranger):
        options = ("--prompt-len", 8, "--new-tokens", CONTEXT - 50, "--draft-model", stranger)
        assert error_line(cli("bench", small("w8a8").directory, *options)) == (
            f"--draft-model: got texts of {CONTEXT + 46} tokens with their {CONTEXT - 50} new ones, "
            f"expected at most {CONTEXT}, the model's context. Lower --new-tokens."
        )

    def test_what_it_says_of_a_float_one(self, small, stranger):
        notes = small("w8a8").engine(draft_model=stranger).notes
        assert notes == ("The draft model is a float one: a quantized one guesses faster.",)

    def test_a_number_of_guesses_without_a_model(self):
        with pytest.raises(ConfigError, match="draft_tokens: got 3, expected `draft_model` beside it"):
            EngineConfig(draft_tokens=3)

    def test_too_little_memory_for_both(self, small, stranger):
        of = small("w8a8")
        of.engine(kv_memory=of.page_bytes)
        with pytest.raises(CapacityError, match=r"which 128 positions take. Leave `draft_model` out. Or: Raise `kv_me"):
            of.engine(kv_memory=of.page_bytes, draft_model=stranger)

    def test_several_processes(self, small, stranger, monkeypatch):
        monkeypatch.setattr(World, "of_environment", classmethod(lambda cls: World(size=2)))
        with pytest.raises(UnsupportedError, match="draft_model: got 2 processes, expected one"):
            small("w8a8").engine(draft_model=stranger)

    def test_a_path_that_is_none(self, small):
        with pytest.raises(InputError, match="LLM: draft_model: got 5, expected the path of a directory"):
            LLM(small("w8a8").directory, draft_model=5)
