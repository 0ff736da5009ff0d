"""The engine behind an event loop: many readers, some of which go away, and an engine that may crash."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from eightfold.engine.async_llm import AsyncLLM, EngineStoppedError
from eightfold.engine.outputs import RequestOutput
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.errors import CapacityError, InputError
from tests.engine.models import Small, assert_idle, config, greedy, tokens

FOREVER = 900  # tokens: more than a test waits for


@asynccontextmanager
async def running(model: Small, **limits: Any) -> AsyncIterator[AsyncLLM]:
    """Start an engine and shut it down."""
    llm = AsyncLLM.load(model.directory, config(**limits))
    try:
        yield llm
    finally:
        await llm.shutdown()
        assert not llm._thread.is_alive()


def run_in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(limited())


async def answer(llm: AsyncLLM, prompt: list[int], params: SamplingParams, **names: Any) -> RequestOutput:
    """Read to the end; what came in pieces is what the last output says."""
    text, ids = "", list[int]()
    async for output in llm.generate(prompt, params, **names):
        for each in output.outputs:
            text += each.delta_text
            ids += each.delta_token_ids
    assert output.finished
    if params.n == 1:
        assert (text, ids) == (output.outputs[0].text, output.outputs[0].token_ids)
    return output


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing left, and prove that nothing was lost."""
    while llm.engine.has_unfinished or llm._orders:
        await asyncio.sleep(0.001)
    assert_idle(llm.engine)
    assert llm._readers == {}


def test_fifty_at_once(small):
    model, rng = small("faquant"), random.Random(1)
    prompts = [tokens(rng, rng.randint(1, 200)) for _ in range(50)]

    async def test() -> None:
        async with running(model, kv_memory=10 * model.page_bytes, speculate=3) as llm:
            found = await asyncio.gather(*[answer(llm, prompt, greedy(40)) for prompt in prompts])
            assert [output.outputs[0].token_ids for output in found] == [model.answer(p, 40) for p in prompts]
            assert len({output.request_id for output in found}) == 50
            await idle(llm)

    run_in_loop(test)


def test_readers_that_are_cancelled_or_stop_reading(small):
    """At random moments; what the others get does not change, and no block is lost."""
    model, rng = small("w8a8"), random.Random(2)
    prompts = [tokens(rng, rng.randint(1, 200)) for _ in range(30)]

    async def leave(llm: AsyncLLM, prompt: list[int], count: int) -> None:
        async with aclosing(llm.generate(prompt, greedy(FOREVER, max_tokens=None))) as outputs:
            async for output in outputs:
                if len(output.outputs[0].token_ids) >= count:
                    break

    async def test() -> None:
        async with running(model) as llm:
            stays = [asyncio.create_task(answer(llm, prompt, greedy(60))) for prompt in prompts[:10]]
            leaves = [asyncio.create_task(leave(llm, prompt, rng.randint(0, 40))) for prompt in prompts[10:20]]
            cancelled = [
                asyncio.create_task(answer(llm, prompt, greedy(FOREVER, max_tokens=None))) for prompt in prompts[20:]
            ]
            for task in cancelled:
                await asyncio.sleep(rng.random() / 100)
                task.cancel()
            found = await asyncio.gather(*stays)
            await asyncio.gather(*leaves)
            assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(
                *cancelled, return_exceptions=True
            ))  # fmt: skip
            assert [output.outputs[0].token_ids for output in found] == [model.answer(p, 60) for p in prompts[:10]]
            await idle(llm)

    run_in_loop(test)


def test_a_slow_reader_gets_more_at_a_time(small):
    """And in the end all; what it does not read does not pile up."""

    async def test() -> None:
        async with running(small("w8a8")) as llm:
            params = SamplingParams(n=3, seed=4, max_tokens=100, ignore_eos=True, logprobs=0)
            ids, logprobs, count = [[], [], []], [[], [], []], 0
            async for output in llm.generate([1, 2, 3], params):
                count += 1
                for each in output.outputs:
                    ids[each.index] += each.delta_token_ids
                    logprobs[each.index] += each.delta_logprobs
                while count == 3 and llm.engine.has_unfinished:
                    await asyncio.sleep(0.001)
            assert count <= 4  # what came meanwhile came at once
            assert [each.token_ids for each in output.outputs] == ids
            assert [each.logprobs for each in output.outputs] == logprobs
            assert [len(each) for each in ids] == [100] * 3

    run_in_loop(test)


def test_tokens_that_come_quickly_wake_the_loop_together_but_for_the_first(small, monkeypatch):
    model, prompt = small("faquant"), tokens(random.Random(9), 40)
    monkeypatch.setattr("eightfold.engine.async_llm.STREAM_SECONDS", 1000)

    async def test() -> None:
        async with running(model) as llm:
            llm._rung_at, rings, ring = time.monotonic(), [], llm._bell.ring
            llm._bell.ring = lambda: (rings.append(len(llm._news)), ring())
            assert (await answer(llm, prompt, greedy(30))).outputs[0].token_ids == model.answer(prompt, 30)
            assert (rings[0], len(rings)) == (1, 2)
            await idle(llm)

    run_in_loop(test)


def test_an_idle_engine_takes_the_memory_of_the_blocks_that_come_next(small, monkeypatch):
    model, rng = small("faquant"), random.Random(7)
    monkeypatch.setattr("eightfold.engine.engine.AHEAD_BYTES", 2 * model.page_bytes)

    async def populated(llm: AsyncLLM, blocks: int) -> None:
        while llm.engine._populated < blocks:
            await asyncio.sleep(0.001)
        assert llm.engine._populated == blocks

    async def test() -> None:
        async with running(model, kv_memory=6 * model.page_bytes) as llm:
            await populated(llm, 2)
            prompt = tokens(rng, 300)
            assert (await answer(llm, prompt, greedy(20))).outputs[0].token_ids == model.answer(prompt, 20)
            await populated(llm, 5)
            await answer(llm, tokens(rng, 400), greedy(2))
            await populated(llm, 6)  # there are no more
            with pytest.raises(ValueError, match="no such page"):
                llm.engine.model._model.populate_cache(0, 6)

    run_in_loop(test)


def test_a_reader_may_want_nothing_but_the_end(small):
    async def test() -> None:
        async with running(small("w8a8")) as llm:
            (output,) = [output async for output in llm.generate([1, 2], greedy(50), streams=False)]
            assert output.outputs[0].delta_token_ids == small("w8a8").answer([1, 2], 50)

    run_in_loop(test)


def test_an_iterator_that_is_never_read_is_no_request(small):
    async def test() -> None:
        async with running(small("w8a8")) as llm:
            outputs = llm.generate([1, 2], greedy(5))
            await asyncio.sleep(0.01)
            assert not llm.engine.has_unfinished
            await outputs.aclose()
            await idle(llm)

    run_in_loop(test)


def test_an_abort_by_name(small):
    async def test() -> None:
        async with running(small("w8a8")) as llm:
            async for output in llm.generate([1, 2], greedy(FOREVER), "name"):
                if len(output.outputs[0].token_ids) >= 5:
                    llm.abort("name")
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
            assert len(output.outputs[0].token_ids) >= 5
            llm.abort("nobody")
            await idle(llm)

    run_in_loop(test)


def test_refusals_come_at_once_and_touch_nothing(small):
    async def test() -> None:
        async with running(small("w8a8")) as llm:
            with pytest.raises(CapacityError, match="prompt: got no tokens"):
                llm.generate([], greedy(5))
            first = asyncio.create_task(answer(llm, [1, 2], greedy(100), request_id="name"))
            await asyncio.sleep(0)
            with pytest.raises(InputError, match="request id: got name"):
                await answer(llm, [1, 2], greedy(5), request_id="name")
            with pytest.raises(InputError, match="regex"):  # compiled in a thread, so with the first item
                await answer(llm, [1, 2], SamplingParams(structured=StructuredOutput(regex="(")))
            assert (await first).outputs[0].token_ids == small("w8a8").answer([1, 2], 100)
            assert llm.is_healthy

    run_in_loop(test)


def test_a_form_is_compiled_beside_the_loop(small):
    async def test() -> None:
        async with running(small("w8a8")) as llm:
            params = SamplingParams(structured=StructuredOutput(regex="[ab]{9}"), seed=1, max_tokens=100, n=2)
            prepare, threads = llm.engine.prepare, []

            def noted(*args: Any, **names: Any) -> Any:
                threads.append(threading.current_thread())
                return prepare(*args, **names)

            llm.engine.prepare = noted
            await answer(llm, [1, 2], greedy(3))
            assert threads == [threading.main_thread()]
            output = await answer(llm, [1, 2], params)
            assert all(len(each.text) == 9 and set(each.text) <= set("ab") for each in output.outputs)
            assert len(threads) == 2
            assert threads[1] is not threading.main_thread()

    run_in_loop(test)


def test_the_event_loop_never_waits_for_a_step(small):
    """Steps wait here for the event loop."""

    async def test() -> None:
        async with running(small("w8a8")) as llm:
            step, entered, left = llm.engine.step, threading.Event(), threading.Event()

            def held() -> list[RequestOutput]:
                entered.set()
                assert left.wait(10), "the event loop waits too"
                left.clear()
                return step()

            llm.engine.step = held
            task = asyncio.create_task(answer(llm, [1, 2], greedy(3)))
            while not task.done():
                await asyncio.sleep(0.001)
                if entered.is_set():
                    entered.clear()
                    left.set()
            assert task.result().finished

    run_in_loop(test)


def test_a_crash_fails_all_requests_and_is_seen(small):
    async def test() -> None:
        async with running(small("w8a8"), max_num_seqs=2) as llm:
            assert llm.is_healthy
            assert llm.failure is None
            tasks = [asyncio.create_task(answer(llm, [1, at], greedy(FOREVER))) for at in range(5)]
            while llm.stats.generated_tokens < 20:
                await asyncio.sleep(0.001)
            llm.engine.model.run = lambda step: 1 / 0  # type: ignore[assignment, return-value]
            message = "^the engine crashed: ZeroDivisionError: division by zero$"
            for task in tasks:  # those that wait too
                with pytest.raises(EngineStoppedError, match=message) as crash:
                    await task
                assert isinstance(crash.value.__cause__, ZeroDivisionError)
            assert not llm.is_healthy
            assert isinstance(llm.failure, ZeroDivisionError)
            with pytest.raises(EngineStoppedError, match=message):
                llm.generate([1], greedy(1))
            assert llm._readers == {}

    run_in_loop(test)


def test_shutdown_lets_the_rest_go_on_for_a_while(small):
    async def test() -> None:
        llm = AsyncLLM.load(small("w8a8").directory, config())
        task = asyncio.create_task(answer(llm, [1, 2], greedy(500)))
        while not llm.stats.generated_tokens:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(llm.shutdown(drain=30))
        await asyncio.sleep(0)
        assert not llm.is_healthy
        with pytest.raises(EngineStoppedError, match="the engine is shutting down"):
            llm.generate([1], greedy(1))
        assert (await task).outputs[0].token_ids == small("w8a8").answer([1, 2], 500)
        await stopping
        assert not llm._thread.is_alive()

    run_in_loop(test)


def test_shutdown_ends_what_takes_too_long(small):
    async def test() -> None:
        llm = AsyncLLM.load(small("w8a8").directory, config(max_num_seqs=1))
        gate = threading.Event()
        step = llm.engine.step

        def held() -> list[RequestOutput]:
            gate.wait(10)
            return step()

        llm.engine.step = held
        tasks = [asyncio.create_task(answer(llm, [1, at], greedy(FOREVER))) for at in range(3)]
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(llm.shutdown(drain=0.01))
        await asyncio.sleep(0.05)
        gate.set()
        await stopping
        for output in await asyncio.gather(*tasks):
            assert output.outputs[0].finish_reason == "abort"
        assert_idle(llm.engine)

    run_in_loop(test)


def test_a_program_that_forgets_the_shutdown_ends_all_the_same(small):
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from eightfold import AsyncLLM, SamplingParams; from eightfold.engine.settings import EngineConfig\n"
        "llm = AsyncLLM.load(Path(sys.argv[1]), EngineConfig(threads=1))\n"
        "async def main():\n"
        "    async for output in llm.generate([1, 2], SamplingParams(max_tokens=900, ignore_eos=True)):\n"
        "        return\n"
        "asyncio.run(main())\n"
        "print('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small("w8a8").directory)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_second_event_loop_after_the_first(small):
    """Also when the first left requests behind."""
    llm = AsyncLLM.load(small("w8a8").directory, config())

    async def first() -> None:
        task = asyncio.create_task(answer(llm, [1, 2], greedy(FOREVER)))
        while not llm.stats.generated_tokens:
            await asyncio.sleep(0.001)
        assert not task.done()

    async def second() -> None:
        assert (await answer(llm, [1, 2], greedy(20))).outputs[0].token_ids == small("w8a8").answer([1, 2], 20)
        await idle(llm)
        await llm.shutdown()

    run_in_loop(first)
    run_in_loop(second)


def test_one_event_loop_at_a_time(small):
    llm = AsyncLLM.load(small("w8a8").directory, config())

    async def test() -> None:
        task = asyncio.create_task(answer(llm, [1, 2], greedy(FOREVER)))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, answer(llm, [1, 2], greedy(5)))
        task.cancel()
        await llm.shutdown()

    run_in_loop(test)
