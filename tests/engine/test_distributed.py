"""Several real processes share a model: the same answers, one that talks, and all end together.

Most of them are started as torchrun starts them, but without it: that alone takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import eightfold
from eightfold.engine import distributed
from eightfold.engine.distributed import pack, unpack
from eightfold.engine.llm import LLM
from eightfold.engine.sampling_params import SamplingParams
from eightfold.engine.settings import EngineConfig
from eightfold.errors import CheckpointError, ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.model import Step
from eightfold.parallel.world import World, require_alike
from eightfold.tokenizer import Tokenizer
from tests.engine.models import Small

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

RUN = ("-m", "eightfold", "run")

# The longest that is waited for anything; far more than it takes.
PATIENCE = 60.0

# How long all may go on after one has died.
LAST_SECONDS = 10.0


@dataclass
class Ranks:
    """Processes of one world."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def ended(self) -> list[tuple[int, str, str]]:
        """Wait for all; return code, stdout and stderr of each."""
        found = [process.communicate(timeout=PATIENCE) for process in self.processes]
        return [(process.returncode, *texts) for process, texts in zip(self.processes, found, strict=True)]


def environment(**more: str) -> dict[str, str]:
    root = str(Path(eightfold.__file__).parent.parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EIGHTFOLD_")}
    return {**kept, "PYTHONPATH": root, "OMP_WAIT_POLICY": "passive", **more}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def start() -> Iterator[Callable[..., Ranks]]:
    """Start a world: the same command in every process, or `commands`, one for each, and variables."""
    started = Ranks()

    def run(*words: object, size: int = 2, commands: Sequence[Sequence[object]] = (), **variables: str) -> Ranks:
        port, ranks = free_port(), Ranks()
        for rank in range(size):
            command = commands[rank] if commands else words
            world = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
            settings = environment(**{name: str(value) for name, value in world.items()}, **variables)
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=settings,
            )
            ranks.processes.append(process)
            started.processes.append(process)
        return ranks

    yield run
    for process in started.processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("exchange", ["memory", pytest.param("gloo", marks=needs_torch)])
def test_run_answers_as_one_process_does(start, small, exchange):
    model: Small = small("w8a8")
    words = (*RUN, model.directory, "--prompt", "hello", "--max-new-tokens", 12, "--ignore-eos", "--json")
    (code, out, err), follower = start(*words, EIGHTFOLD_EXCHANGE=exchange).ended()
    assert (code, follower) == (0, (0, "", "")), err
    found = json.loads(out)
    assert found["token_ids"] == model.answer(Tokenizer(model.directory).encode("hello"), 12)
    assert found["world_size"] == len(found["resident_weights_mib"]) == 2


@pytest.mark.parametrize(
    ("name", "option", "exchange"),
    [
        ("qwen3 experts", "--expert-parallel", "memory"),
        ("mixtral", "", "memory"),
        pytest.param("mixtral", "--expert-parallel", "gloo", marks=needs_torch),
        pytest.param("qwen3 experts", "", "gloo", marks=needs_torch),
    ],
)
def test_experts_are_shared_out_in_either_way(start, small, name, option, exchange):
    model: Small = small(name)
    words = (*RUN, model.directory, "--prompt", "hello", "--max-new-tokens", 12, "--ignore-eos", "--json")
    words = (*words, option) if option else words
    (code, out, err), follower = start(*words, EIGHTFOLD_EXCHANGE=exchange).ended()
    assert (code, follower) == (0, (0, "", "")), err
    assert json.loads(out)["token_ids"] == model.answer(Tokenizer(model.directory).encode("hello"), 12)


SCRIPT = """
    import json, sys
    from eightfold import LLM, SamplingParams

    llm = LLM(sys.argv[1], threads=1, max_num_seqs=4, max_batched_tokens=64, speculate=4)
    llm.engine.scheduler.guesser.row_cost = 0.0
    text = "one two three one two three one two"
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_tokens=20, n=2, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=1),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=30, repetition_penalty=1.2),
    ]
    found = llm.generate([text * 6, text, "x" * 150, text * 6], params, progress=False)
    answers = [answer for each in found for answer in each.outputs]
    print(json.dumps([(answer.token_ids, answer.text, [repr(p) for p in answer.logprobs or []]) for answer in answers]))
"""


@pytest.mark.parametrize("name", ["faquant", "mix"])
def test_the_engine_answers_as_in_one_process(start, small, name):
    """Sampling, several answers, log-probabilities, shared beginnings, guesses: all int8 schemes have the same bits."""
    script = textwrap.dedent(SCRIPT)
    words = ("-c", script, small(name).directory)
    alone = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment(), timeout=PATIENCE
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    assert start(*words).ended() == [(0, alone.stdout, ""), (0, "", "")]


def test_a_batch_run_that_has_nothing_to_do_ends_in_all(start, small, tmp_path):
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = (
        *RUN,
        small("w8a8").directory,
        "--input-file",
        source,
        "--output-file",
        out,
        "--max-new-tokens",
        3,
        "--json",
    )
    first, second = (start(*words).ended() for _ in range(2))
    assert [code for code, _, _ in first + second] == [0] * 4
    assert [(text, err) for _, text, err in (first[1], second[1])] == [("", "")] * 2
    facts = [json.loads(each[0][1]) for each in (first, second)]
    assert [(f["answered"], f["answered_before"], f["world_size"]) for f in facts] == [(2, 0, 2), (0, 2, 1)]
    assert len(out.read_text().splitlines()) == 2


def test_bench_tells_of_all(start, small):
    words = ("-m", "eightfold", "bench", small("w8a8").directory, "--prompt-len", 8, "--new-tokens", 3, "--repeat", 1)
    # The buffer that the bandwidth is measured with is large.
    script = "import sys\nfrom eightfold.model.native import measure\nmeasure.READ_BYTES = 1 << 20\n"
    script += "from eightfold.cli.main import main\nsys.exit(main())"
    (code, out, err), follower = start("-c", script, *words[2:], "--json").ended()
    assert (code, follower) == (0, (0, "", "")), err
    found = json.loads(out)
    assert found["world_size"] == len(found["resident_weights_mib"]) == 2
    assert found["weights_bytes"] == small("w8a8").alone.weight_bytes
    assert found["kv_bytes_per_token"] == small("w8a8").page_bytes // 128


# --- what does not fit together


def refusal(ranks: Ranks) -> str:
    """Return the one line that is said, by rank 0."""
    (code, out, err), (_, other_out, other_err) = ranks.ended()
    assert (code, out, other_out, other_err) == (2, "", "", "")
    assert err.startswith("eightfold: ") and err.endswith("\n")
    return err.removeprefix("eightfold: ").removesuffix("\n")


def with_rank_1(model: Small, words: Sequence[object] = ()) -> list[tuple[object, ...]]:
    """Return commands of two ranks, of which the second is given."""
    first = (*RUN, model.directory, "--prompt", "hi")
    return [first, (*words,) if words else first]


def test_a_command_for_one_process_is_refused_by_name(start, small):
    said = refusal(start("-m", "eightfold", "eval", small("w8a8").directory))
    assert said == "eval: got 2 processes, expected one. Start it without torchrun."


def test_another_version_is_refused_by_name(start, small):
    model = small("w8a8")
    script = "import eightfold, sys\neightfold.__version__ = '9.9'\nfrom eightfold.cli.main import main\nmain()"
    ranks = start(commands=with_rank_1(model, ("-c", script, "run", model.directory, "--prompt", "hi")))
    said = refusal(ranks)
    assert said.startswith(
        f"eightfold of rank 1 (process {ranks.processes[1].pid} on {socket.gethostname()}): got 9.9, "
    )
    assert said.endswith(f"expected {eightfold.__version__}, as rank 0 has. Install the same version on all hosts.")


def test_experts_that_are_not_there_cannot_be_shared_out(start, small):
    said = refusal(start(*RUN, small("w8a8").directory, "--prompt", "hi", "--expert-parallel"))
    assert said == "--expert-parallel: got a dense model, expected one with experts. Leave it out."


def test_experts_that_are_shared_out_in_another_way_are_refused(start, small):
    model = small("mixtral")
    words = (*RUN, model.directory, "--prompt", "hi", "--expert-parallel")
    said = refusal(start(commands=with_rank_1(model, words)))
    assert "options of rank 1" in said and "got asymmetric, cache, any positions, expert_parallel, expected" in said


def test_another_checkpoint_is_refused_by_name(start, small, tmp_path):
    model = small("w8a8")
    other = tmp_path / "other"
    shutil.copytree(model.directory, other)
    (weights,) = other.glob("*.safetensors")
    weights.chmod(0o600)
    data = bytearray(weights.read_bytes())
    at = 8 + int.from_bytes(data[:8], "little")
    data[at] ^= 1  # the first number of the first tensor
    weights.write_bytes(data)
    said = refusal(start(commands=with_rank_1(model, (*RUN, other, "--prompt", "hi"))))
    assert said.startswith("checkpoint of rank 1 (process ")
    assert said.endswith(", as rank 0 has. Copy the model directory to all hosts again.")


def test_what_rank_1_lacks_is_told_by_rank_0(start, small, tmp_path):
    said = refusal(start(commands=with_rank_1(small("w8a8"), (*RUN, tmp_path / "none", "--prompt", "hi"))))
    assert said.startswith("rank 1 (process ")
    assert said.endswith(f"no directory {tmp_path / 'none'}: expected a model directory. Check the path.")


def test_what_differs_is_named(small):
    checkpoint = Checkpoint.open(small("w8a8").directory)
    own = distributed._setup(World(size=2), checkpoint, EngineConfig().computing)
    assert set(own) == set(distributed._ADVICE)
    require_alike(own, [("rank 1", own), ("rank 2", own)], distributed._ADVICE)
    for name, action in distributed._ADVICE.items():
        with pytest.raises(CheckpointError if name == "checkpoint" else ConfigError) as caught:
            require_alike(own, [("rank 1", own), ("rank 2", {**own, name: "other"})], distributed._ADVICE)
        assert str(caught.value) == f"{name} of rank 2: got other, expected {own[name]}, as rank 0 has. {action}"


def test_uneven_heads_are_refused_once(start, small):
    found = start(*RUN, small("w8a8").directory, "--prompt", "hi", size=3).ended()
    assert [code for code, _, _ in found] == [2, 0, 0]
    assert "".join(err for _, _, err in found) == (
        f"eightfold: number of processes in {small('w8a8').directory}: got 3, expected 1, 2 or 4, among which 4 query "
        "heads and 2 key/value heads can be shared out evenly. Change --nproc_per_node or --nnodes of torchrun.\n"
    )


def test_a_wrong_option_is_told_once(start, small):
    found = start(*RUN, small("w8a8").directory, "--prompt", "hi", "--max-new-tokens", 0).ended()
    assert [code for code, _, _ in found] == [2, 2]
    assert found[0][2].count("\n") == 1 and found[1][2] == ""


def test_the_reference_backend_is_for_one_process(start, small):
    found = start(*RUN, small("w8a8").directory, "--prompt", "hi", "--backend", "reference").ended()
    assert [code for code, _, _ in found] == [2, 2]
    assert found[0][2] == (
        "eightfold: the reference backend: got 2 processes, expected one. Start it without torchrun.\n"
    )


# --- processes that die


IDLE = """
    import sys, time
    from eightfold import LLM

    llm = LLM(sys.argv[1], threads=1)
    print("ready", flush=True)
    time.sleep(60)
"""
BUSY = """
    import sys
    from eightfold import LLM, SamplingParams

    llm = LLM(sys.argv[1], threads=1)
    print("ready", flush=True)
    while True:
        llm.generate("hello", SamplingParams(max_tokens=500, ignore_eos=True), progress=False)
"""


def ready(ranks: Ranks) -> None:
    stdout = ranks.processes[0].stdout
    assert stdout is not None
    assert stdout.readline() == "ready\n"


@pytest.mark.parametrize(
    ("script", "dies", "size"),
    [(IDLE, 0, 2), (BUSY, 0, 2), (BUSY, 1, 2), (IDLE, 3, 4)],
    ids=["idle-0", "busy-0", "busy-1", "idle-3"],
)
def test_a_rank_that_is_killed_ends_all_with_one_line(start, small, script, dies, size):
    ranks = start("-c", textwrap.dedent(script), small("w8a8").directory, size=size)
    ready(ranks)
    time.sleep(0.1)
    ranks.processes[dies].kill()
    killed = time.monotonic()
    found = ranks.ended()
    assert time.monotonic() - killed < LAST_SECONDS
    codes = [code for code, _, _ in found]
    assert codes[dies] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 2}
    name = f"rank {dies} (process {ranks.processes[dies].pid} on {socket.gethostname()})"
    assert "".join(err for _, _, err in found) == (
        f"eightfold: {name}: it has died or cannot be reached, so all others end. Start the command again.\n"
    )


def test_ctrl_c_ends_all_with_one_line(start, small):
    """The terminal sends it to all."""
    words = (*RUN, small("w8a8").directory, "--prompt", "hi", "--max-new-tokens", 1000, "--ignore-eos")
    ranks = start(*words, "--speculate", 0, "--temperature", 0)
    assert ranks.processes[0].stdout is not None
    assert ranks.processes[0].stdout.read(1)  # the answer has begun
    for process in reversed(ranks.processes):
        process.send_signal(signal.SIGINT)
    (code, _, err), follower = ranks.ended()
    assert (code, follower) == (2, (0, "", ""))
    assert err == "eightfold: interrupted: nothing was left half-written. Run the same command to start again.\n"


def test_a_rank_that_fails_says_why_through_rank_0(start, small):
    script = textwrap.dedent(IDLE).replace("import sys, time", "import sys\nfrom eightfold.engine import distributed")
    script = script.replace("llm = ", "distributed.unpack = lambda order: 1 // 0\nllm = ", 1)
    script = script.replace("time.sleep(60)", "llm.generate('hello', progress=False)")
    (code, _, err), (other, _, _) = start("-c", script, small("w8a8").directory).ended()
    assert (code, other) == (2, 2)
    assert err.startswith("eightfold: rank 1 (process ")
    assert err.endswith("): integer division or modulo by zero. Start the command again.\n")


@needs_torch
def test_torchrun_starts_it(small):
    model: Small = small("w8a8")
    run = (*RUN, model.directory, "--prompt", "hello", "--max-new-tokens", 5, "--json")
    command = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), *run)
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(), timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["world_size"] == 2


# --- parts


def test_an_order_is_what_was_packed():
    step = Step(
        token_ids=np.array([7, 8, 9, 5, 6], np.int32),
        positions=np.array([128, 129, 130, 0, 77], np.int32),
        generated=np.array([0, 0, 1, 0, 1], np.uint8),
        starts=np.array([0, 3, 4, 5], np.int32),
        tables=np.array([[4, 1], [2, 0], [3, 0]], np.int32),
        rows=np.array([4, 2], np.int32),
        shown=1,
    )
    order = pack(step)
    assert len(order) == 4 * (6 + 5 + 3 + 4 + 6 + 2) + 5
    found = unpack(bytearray(order))
    for name in ("token_ids", "positions", "generated", "starts", "tables", "rows"):
        before, after = getattr(step, name), getattr(found, name)
        assert (after.dtype, after.tolist()) == (before.dtype, before.tolist()), name
        assert after.flags.c_contiguous
    assert found.shown == 1


WORLD = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch) -> Callable[..., None]:
    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_world_is_what_torchrun_says(variables):
    assert World.of_environment() == World()
    assert World().is_first and World().is_one_host and World().speaks
    variables(**WORLD)
    world = World.of_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.port) == (1, 4, 1, 2, 29500)
    assert not (world.is_first or world.is_one_host or world.speaks)
    variables(RANK="2", LOCAL_RANK="0")
    assert World.of_environment().speaks  # once on each host


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got two, expected a number."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got 0, expected a number."),
        ({"RANK": ""}, "RANK: got nothing, expected a number."),
        ({"MASTER_PORT": ""}, "MASTER_PORT: got nothing, expected a number."),
        (
            {"RANK": "4"},
            "processes: got RANK=4, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, expected ranks below their number.",
        ),
    ],
)
def test_a_world_that_makes_no_sense_is_refused(variables, changed, message):
    variables(**{**WORLD, **changed})
    with pytest.raises(ConfigError) as caught:
        World.of_environment()
    assert str(caught.value) == f"{message} Start them with torchrun --nproc_per_node N -m eightfold ..."


def test_threads_are_divided_among_the_processes_of_a_host(monkeypatch):
    monkeypatch.delenv("EIGHTFOLD_THREADS", raising=False)
    usable = core.extension.usable_cpus()
    assert core.choose_threads(None, 2) == max(1, usable // 2)
    assert core.choose_threads(None, 10**6) == 1
    assert core.choose_threads(3, 2) == 3


def test_one_process_is_as_without_all_this(small):
    llm = LLM(small("w8a8").directory, threads=1)
    assert type(llm.engine.model).__name__ == "NativeModel"
    assert llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True), progress=False)[0].finished
    assert (llm.engine.model.world_size, len(llm.engine.model.resident_weights)) == (1, 1)
