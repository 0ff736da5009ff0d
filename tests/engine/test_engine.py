"""Whatever else runs, and however its steps are cut, every answer is the one that the model gives alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eightfold.engine.engine import Engine
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampler import prompt_logprobs
from eightfold.engine.sampling_params import SamplingParams
from eightfold.model.native.model import PAGE
from tests.engine.models import CONTEXT, RECIPES, Small, answers, assert_idle, greedy, run, step, tokens
from tests.native.models import logits_of

MODEL = pytest.mark.parametrize("name", RECIPES)


def prompts_of(rng: random.Random, count: int, longest: int = 400) -> list[list[int]]:
    """Return prompts of which some begin alike, up to inside a block or to its end."""
    stems = [tokens(rng, length) for length in (PAGE, PAGE + 40, 2 * PAGE)]
    found = []
    for _ in range(count):
        stem = rng.choice([[], [], *stems])
        found.append(stem + tokens(rng, rng.randint(1, longest - len(stem))))
    return found


class Crowd:
    """Requests that arrive at random moments; some are aborted."""

    def __init__(self, engine: Engine, requests: Sequence[tuple[list[int], SamplingParams]], seed: int) -> None:
        self.engine, self.requests, self.rng = engine, requests, random.Random(seed)
        self.last: dict[str, RequestOutput] = {}

    def run(self, *, arrival: float = 0.5, abort: float = 0.0) -> Crowd:
        """Run to the end; `arrival` and `abort` are chances in a step."""
        waiting = list(range(len(self.requests)))
        while waiting or self.engine.has_unfinished:
            while waiting and self.rng.random() < arrival:
                at = waiting.pop(0)
                self.engine.add_request(str(at), *self.requests[at])
            for output in step(self.engine):
                self.last[output.request_id] = output
            going = self.engine.request_ids
            if going and self.rng.random() < abort:
                output = self.engine.abort(self.rng.choice(going))
                assert output is not None and output.finished
                self.last[output.request_id] = output
        assert_idle(self.engine)
        return self

    def check(self, expected: Sequence[Sequence[int]]) -> int:
        """Compare every answer; return how many were aborted: those have to be the beginning of what is expected."""
        aborted = 0
        for at, tokens_of in enumerate(expected):
            output = self.last[str(at)]
            assert output.finished
            for answer in output.outputs:
                if answer.finish_reason == "abort":
                    aborted += 1
                    assert answer.token_ids == tokens_of[: len(answer.token_ids)]
                else:
                    assert (at, answer.token_ids) == (at, tokens_of)
        return aborted


def greedy_crowd(small: Small, seed: int, count: int = 20, most: int = 60) -> tuple[Any, list[list[int]]]:
    rng = random.Random(seed)
    requests = [(prompt, greedy(rng.randint(1, most))) for prompt in prompts_of(rng, count)]
    return requests, [small.answer(prompt, params.max_tokens) for prompt, params in requests]


@MODEL
@pytest.mark.parametrize("budget", [16, 17, 100, 512])
def test_random_arrivals_in_steps_of_any_size(small, name, budget):
    requests, expected = greedy_crowd(small(name), seed=budget)
    engine = small(name).engine(max_batched_tokens=budget)
    assert Crowd(engine, requests, seed=budget).run().check(expected) == 0
    assert engine.stats.generated_tokens == sum(map(len, expected))
    assert engine.stats.prefix_hit_tokens > 0


@MODEL
@pytest.mark.parametrize("speculate", [0, 5])
def test_little_memory(small, name, speculate):
    """Blocks for two sequences of eight: they are stopped again and again, and end all the same."""
    requests, expected = greedy_crowd(small(name), seed=3, most=200)
    engine = small(name).engine(kv_memory=5 * small(name).page_bytes, speculate=speculate)
    assert Crowd(engine, requests, seed=3).run(arrival=0.9).check(expected) == 0
    assert engine.blocks.total == 5
    assert engine.stats.preemptions > 3


def test_steps_of_hardly_any_tokens(small):
    """What was generated is computed again, one token a step, beside sequences that go on one token a step."""
    requests, expected = greedy_crowd(small("mix"), seed=8, count=12, most=300)
    engine = small("mix").engine(
        max_num_seqs=3, max_batched_tokens=4, kv_memory=6 * small("mix").page_bytes, prefix_caching=False
    )
    assert Crowd(engine, requests, seed=8).run(arrival=0.9).check(expected) == 0
    assert engine.stats.preemptions > 1


@MODEL
def test_aborts_at_any_moment(small, name):
    for seed in range(4):
        requests, expected = greedy_crowd(small(name), seed=seed)
        engine = small(name).engine(kv_memory=7 * small(name).page_bytes, speculate=seed % 2 * 4)
        crowd = Crowd(engine, requests, seed=seed).run(arrival=0.3, abort=0.15)
        assert crowd.check(expected) >= 3


@MODEL
def test_speculation_changes_nothing_but_the_number_of_steps(small, name):
    """Answers of random models run in circles, which is easy to guess."""
    requests, expected = greedy_crowd(small(name), seed=5, count=6)
    requests = [(prompt, greedy(200)) for prompt, _ in requests]
    expected = [small(name).answer(prompt, 200) for prompt, _ in requests]
    engine = small(name).engine(speculate=6)
    engine.scheduler.guesser.row_cost = 0.05
    assert Crowd(engine, requests, seed=5).run().check(expected) == 0
    stats = engine.stats
    assert 0 < stats.accepted < stats.drafted
    assert stats.generated_tokens == sum(map(len, expected))


@MODEL
def test_logits_have_the_bits_of_a_run_alone(small, name):
    """Tokens might agree by luck; log-probabilities of all tokens do not."""
    rng = random.Random(11)
    prompts = prompts_of(rng, 12)
    engine = small(name).engine(kv_memory=6 * small(name).page_bytes, speculate=3)
    engine.scheduler.guesser.row_cost = 0.05
    for at, prompt in enumerate(prompts):
        engine.add_request(str(at), prompt, greedy(150, logprobs=0))
    found = run(engine)
    assert engine.stats.preemptions and engine.stats.accepted and engine.stats.prefix_hit_tokens
    for at, prompt in enumerate(prompts):
        (answer,) = found[str(at)]
        logits = logits_of(small(name).alone, prompt + answer.token_ids, prompt_len=len(prompt))
        expected = prompt_logprobs(logits[len(prompt) - 1 : -1], answer.token_ids, 0)
        assert [each.token_id for each in answer.logprobs] == answer.token_ids
        # The logits are equal; this is rounding of their logarithms in any order, 320 terms in double or float.
        np.testing.assert_allclose(
            [each.logprob for each in answer.logprobs], [each.logprob for each in expected], rtol=0, atol=1e-5
        )


def sampled(rng: random.Random, count: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.03, 1.0]), top_k=rng.choice([0, 5]), seed=rng.randrange(2**40), max_tokens=count,
        presence_penalty=rng.choice([0.0, 0.5]), n=rng.randint(1, 3), ignore_eos=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mix", "faquant"])
@pytest.mark.parametrize("speculate", [0, 4])
def test_a_seed_gives_the_same_answers_in_any_company(small, name, speculate):
    rng = random.Random(7)
    requests = {str(at): (prompt, sampled(rng, 150)) for at, prompt in enumerate(prompts_of(rng, 8))}
    alone = small(name).engine(max_num_seqs=1, prefix_caching=False)
    expected = {at: answers(alone, {at: request})[at] for at, request in requests.items()}
    engine = small(name).engine(kv_memory=6 * small(name).page_bytes, speculate=speculate)
    if speculate:
        engine.scheduler.guesser.row_cost = 0.05
    assert answers(engine, requests) == expected
    assert answers(engine, dict(reversed(requests.items()))) == expected
    assert engine.stats.preemptions and engine.stats.prefix_hit_tokens
    assert bool(engine.stats.accepted) == bool(speculate)


def test_answers_of_one_request_differ_and_each_has_a_stream_of_its_own(small):
    prompt = tokens(random.Random(1), 300)
    engine = small("c8").engine()
    params = SamplingParams(n=4, seed=3, max_tokens=30, ignore_eos=True)
    found = answers(engine, {"": (prompt, params)})[""]
    assert len({tuple(each) for each in found}) == 4
    assert answers(engine, {"": (prompt, replace(params, n=2))})[""] == found[:2]
    # The prompt's full blocks were computed once, the rest and the first token's logits by each.
    assert engine.stats.prompt_tokens == 300 + 3 * (300 - 2 * PAGE) + 2 * (300 - 2 * PAGE)


def test_without_a_seed_answers_differ(small):
    engine = small("c8").engine()
    request = (tokens(random.Random(1), 10), SamplingParams(max_tokens=30, ignore_eos=True))
    assert answers(engine, {"": request}) != answers(engine, {"": request})


@MODEL
def test_the_next_turn_of_a_chat_finds_what_was_generated(small, name):
    """Where prompts and answers are computed alike; in schemes that tell them apart only the prompt is found."""
    rng = random.Random(2)
    prompt = tokens(rng, 200)
    engine = small(name).engine()
    (answer,) = answers(engine, {"": (prompt, greedy(400))})[""]
    turn = prompt + answer + tokens(rng, 20)
    engine.add_request("turn", turn, greedy(30))
    cached = [output.cached_tokens for output in step(engine)]
    while engine.has_unfinished:
        for output in step(engine):
            cached.append(output.cached_tokens)
            found = output.outputs[0].token_ids
    assert found == small(name).answer(turn, 30)
    # All full blocks that were computed: the last token was not.
    assert set(cached) == {PAGE if name == "mix" else (200 + 400 - 1) // PAGE * PAGE}


def test_a_prompt_of_full_blocks_is_found_but_for_its_last_one(small):
    """The last token is computed always: its logits are wanted."""
    prompt = tokens(random.Random(2), 3 * PAGE)
    engine = small("w8a8").engine()
    for _ in range(2):
        engine.add_request("", prompt, greedy(5))
        assert run(engine)[""][0].token_ids == small("w8a8").answer(prompt, 5)
    assert engine.stats.prefix_hit_tokens == 2 * PAGE
    assert engine.stats.prefix_query_tokens == 6 * PAGE


def test_only_requests_with_the_same_salt_find_each_other_s_blocks(small):
    prompt = tokens(random.Random(4), 2 * PAGE + 5)
    engine = small("w8a8").engine()
    found = []
    for salt in ("", "a", "", "a", "b"):
        engine.submit(engine.prepare("", prompt, greedy(5), cache_salt=salt))
        hits = engine.stats.prefix_hit_tokens
        assert run(engine)[""][0].token_ids == small("w8a8").answer(prompt, 5)
        found.append(engine.stats.prefix_hit_tokens - hits)
    assert found == [0, 0, 2 * PAGE, 2 * PAGE, 0]


def test_prefix_caching_can_be_switched_off(small):
    prompt = tokens(random.Random(2), 300)
    engine = small("w8a8").engine(prefix_caching=False)
    for _ in range(2):
        answers(engine, {"": (prompt, greedy(5))})
    assert engine.stats.prefix_hit_tokens == 0
    assert engine.stats.prompt_tokens == 600


def test_requests_that_arrive_together_compute_their_common_beginning_once(small):
    rng = random.Random(3)
    stem = tokens(rng, 3 * PAGE)
    prompts = [stem + tokens(rng, 10) for _ in range(5)]
    engine = small("faquant").engine(max_batched_tokens=100)
    found = answers(engine, {str(at): (prompt, greedy(9)) for at, prompt in enumerate(prompts)})
    assert found == {str(at): [small("faquant").answer(prompt, 9)] for at, prompt in enumerate(prompts)}
    assert engine.stats.prompt_tokens == 3 * PAGE + 5 * 10


class TestFloatPrompts:
    """Attention mode mindie: a prompt attends over floats, so it has to run whole and nothing of it can be reused."""

    @pytest.fixture
    def model(self, small) -> Small:
        from eightfold.format.checkpoint import Checkpoint
        from eightfold.model.native.load import load_model

        model = small("c8")
        alone = load_model(Checkpoint.open(model.directory), threads=1, attention="mindie")
        assert alone.float_prompts
        return Small(model.directory, alone)

    def test_answers(self, model):
        requests, expected = greedy_crowd(model, seed=4)
        engine = model.engine(attention_mode="mindie", kv_memory=6 * model.page_bytes, speculate=3)
        assert Crowd(engine, requests, seed=4).run(arrival=0.8).check(expected) == 0
        assert engine.stats.preemptions
        assert engine.stats.prefix_hit_tokens == 0

    def test_it_says_so(self, model, small):
        (note,) = model.engine(attention_mode="mindie").notes
        assert note == "Attention mode mindie runs every prompt whole: chunked prefill and prefix caching are off."
        assert model.engine().notes == ()
        # Without int8 keys and values the two modes are the same.
        assert small("w8a8").engine(attention_mode="mindie").notes == ()


class TestEnds:
    """What ends an answer."""

    def test_at_the_model_s_own_stop_token(self, small):
        model = small("float")
        prompt, whole = stopping(model, CONTEXT)
        engine = model.engine()
        engine.add_request("", prompt, greedy(900, ignore_eos=False, logprobs=0))
        (answer,) = run(engine)[""]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        assert answer.token_ids == whole
        assert len(answer.logprobs) == len(whole)

    def test_not_if_it_is_ignored_nor_before_min_tokens(self, small):
        model = small("float")
        prompt, whole = stopping(model, CONTEXT)
        engine = model.engine(speculate=4)
        more = len(whole) + 5
        params = greedy(more, ignore_eos=False, min_tokens=more)
        found = answers(engine, {"ignored": (prompt, greedy(more)), "too early": (prompt, params)})
        assert found["ignored"] == [model.answer(prompt, more)]
        assert len(found["too early"][0]) == more
        assert found["too early"][0][: len(whole)] == whole

    def test_at_a_stop_token_of_the_request(self, small):
        model = small("float")
        prompt = tokens(random.Random(5), 20)
        whole = model.answer(prompt, 30)
        at = next(i for i in range(5, 30) if whole[i] not in whole[:i])
        engine = model.engine()
        engine.add_request("", prompt, greedy(30, stop_token_ids=(whole[at],)))
        (answer,) = run(engine)[""]
        assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (whole[:at], "stop", whole[at])

    @pytest.mark.parametrize("streams", [True, False])
    @pytest.mark.parametrize("speculate", [0, 4])
    def test_at_a_stop_string(self, small, streams, speculate):
        model = small("float")
        engine = model.engine(speculate=speculate)
        prompt = tokens(random.Random(6), 20)
        engine.add_request("", prompt, greedy(60))
        (whole,) = run(engine)[""]
        stop = whole.text[8:11]
        engine.add_request("", prompt, greedy(60, stop=stop), streams=streams)
        (answer,) = run(engine)[""]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert len(answer.token_ids) < 60

    def test_at_its_length_or_the_context_s(self, small):
        model = small("w8a8")
        engine = model.engine(max_model_len=200)
        prompt = tokens(random.Random(7), 150)
        for most, expected in ((1, 1), (30, 30), (50, 50), (51, 50), (None, 50)):
            engine.add_request("", prompt, greedy(5, max_tokens=most))
            (answer,) = run(engine)[""]
            assert (len(answer.token_ids), answer.finish_reason) == (expected, "length")
        assert answer.token_ids == model.answer(prompt, 50)

    def test_at_the_end_of_the_memory(self, small):
        """Without a limit of its own, an answer goes as far as the cache does; the last token needs no place."""
        model = small("w8a8")
        engine = model.engine(kv_memory=2 * model.page_bytes)
        engine.add_request("", tokens(random.Random(7), 150), greedy(5, max_tokens=None))
        (answer,) = run(engine)[""]
        assert (len(answer.token_ids), answer.finish_reason) == (2 * PAGE - 150 + 1, "length")


def stopping(model: Small, longest: int) -> tuple[list[int], list[int]]:
    """Return a prompt whose answer ends by itself, after some tokens, and the answer."""
    for seed in range(200):
        prompt = tokens(random.Random(seed), 10)
        whole = model.answer(prompt, 60, frozenset({257}))
        if 3 < len(whole) < 60:
            return prompt, whole
    raise AssertionError("no answer ends by itself")


class TestOutputs:
    """What a caller sees of a request."""

    def test_deltas_make_up_the_whole(self, small):
        engine = small("faquant").engine(speculate=4)
        prompt = tokens(random.Random(8), 100)
        params = SamplingParams(n=3, seed=1, max_tokens=50, logprobs=2, ignore_eos=True)
        engine.add_request("", prompt, params)
        text, ids, logprobs = [""] * 3, [[], [], []], [[], [], []]
        while engine.has_unfinished:
            for output in step(engine):
                for answer in output.outputs:
                    text[answer.index] += answer.delta_text
                    ids[answer.index] += answer.delta_token_ids
                    logprobs[answer.index] += answer.delta_logprobs
        assert output.finished and output.prompt_ids == tuple(prompt)
        for answer in output.outputs:
            assert (answer.text, answer.token_ids, answer.logprobs) == (
                text[answer.index], ids[answer.index], logprobs[answer.index]
            )  # fmt: skip
            assert len(ids[answer.index]) == 50
            assert answer.text == engine.tokenizer.decode(answer.token_ids)
        assert repr(output.outputs[1]).startswith("CompletionOutput(index=1, text=")

    def test_an_output_keeps_what_it_stood_for(self, small):
        engine = small("float").engine()
        engine.add_request("", [1, 2, 3], greedy(20))
        outputs = [output for _ in range(20) for output in engine.step()]
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 21))
        assert [output.finished for output in outputs] == [False] * 19 + [True]

    def test_an_output_takes_in_those_that_were_not_read(self, small):
        engine = small("float").engine()
        engine.add_request("", [1, 2, 3], greedy(20, n=2, stop_token_ids=(0,)))
        outputs = [output for _ in range(20) for output in engine.step()]
        only_second = outputs[4]
        del only_second.outputs[0]  # as if the other had not moved
        for earlier, later in itertools.pairwise(outputs[2:6]):
            later.begin_with(earlier)
        assert [each.index for each in outputs[5].outputs] == [0, 1]
        for answer in outputs[5].outputs:
            assert answer.delta_token_ids == answer.token_ids[2:]
            assert answer.delta_text == engine.tokenizer.decode(answer.token_ids)[len(outputs[1].outputs[0].text) :]

    def test_only_the_last_if_it_does_not_stream(self, small):
        engine = small("float").engine()
        engine.add_request("quiet", [1, 2, 3], greedy(20), streams=False)
        engine.add_request("loud", [1, 2, 3], greedy(20))
        found: dict[str, list[RequestOutput]] = {"quiet": [], "loud": []}
        while engine.has_unfinished:
            for output in step(engine):
                found[output.request_id].append(output)
        assert (len(found["quiet"]), len(found["loud"])) == (1, 20)
        assert found["quiet"][0].outputs[0].text == found["loud"][-1].outputs[0].text

    def test_times(self, small):
        engine = small("float").engine(max_num_seqs=1)
        engine.add_request("0", [1, 2, 3], greedy(3))
        engine.add_request("1", [1, 2, 3], greedy(3))
        last = {output.request_id: output for _ in range(8) for output in engine.step()}
        first, second = last["0"].times, last["1"].times
        assert first.arrival <= first.scheduled < first.first_token < first.finished <= second.scheduled
        assert second.arrival < first.finished

    def test_an_abort_gives_what_there_is(self, small):
        engine = small("float").engine()
        engine.add_request("", [1, 2, 3], greedy(20, n=2))
        for _ in range(5):
            step(engine)
        output = engine.abort("")
        assert output is not None and output.finished
        assert [(len(each.token_ids), each.finish_reason) for each in output.outputs] == [(5, "abort")] * 2
        assert engine.abort("") is None
        assert_idle(engine)

    @pytest.mark.parametrize("pages", [4, 8])
    def test_log_probabilities_of_a_prompt(self, small, pages):
        """In pieces, beside others, stopped and begun anew, with parts of it in the cache."""
        model, rng = small("mix"), random.Random(9)
        prompt = tokens(rng, 300)
        engine = model.engine(kv_memory=pages * model.page_bytes, max_batched_tokens=100)
        answers(engine, {"": (prompt, greedy(3))})
        others = {str(at): (tokens(rng, 90), greedy(60)) for at in range(4)}
        for request_id, request in others.items():
            engine.add_request(request_id, *request)
        engine.add_request("", prompt, greedy(20, prompt_logprobs=2, n=2))
        seen = []
        while engine.has_unfinished:
            seen += [output for output in step(engine) if output.request_id == ""]
        assert bool(engine.stats.preemptions) == (pages == 4)
        logits = logits_of(model.alone, prompt)
        expected = prompt_logprobs(logits[:-1], prompt[1:], 2)
        assert seen[-1].prompt_logprobs == [None, *expected]
        assert [each.token_ids for each in seen[-1].outputs] == [model.answer(prompt, 20)] * 2
