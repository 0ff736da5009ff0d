"""Several processes make what one makes, byte for byte; they end together, and any number of them goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.errors import CheckpointError, ConfigError
from eightfold.format.journal import layers_done, partial_path, read_entries
from eightfold.parallel.ranks import ADVICE, Ranks
from eightfold.parallel.world import require_alike
from eightfold.quant import hidden
from eightfold.quant.hidden import sample_batches
from eightfold.quant.identity import float_facts
from tests.conftest import Result, tiny_config, write_model
from tests.quant.killing import killed_after
from tests.quant.ranks import RECIPES, quantize
from tests.refusal import snapshot

ROOT = Path(__file__).parents[2]
LAYERS = 3
END_SECONDS = 10.0


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Undo what quantize() sets in this process."""
    monkeypatch.setattr(hidden, "BATCH_TOKENS", hidden.BATCH_TOKENS)
    monkeypatch.setattr(hidden, "_FEW_TOKENS", hidden._FEW_TOKENS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = tiny_config("Qwen2ForCausalLM", num_hidden_layers=LAYERS)
    return write_model(tmp_path_factory.mktemp("model") / "float", config)


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """Return what one process makes by a recipe."""
    folder = tmp_path_factory.mktemp("alone")

    def make(name: str) -> dict[str, tuple[int, bytes]]:
        if not (folder / name).exists():
            quantize(source, folder / name, name)
        return snapshot(folder / name)

    return make


@dataclass
class Ended:
    """How a process ended."""

    code: int
    err: str


def start(size: int, **job: Any) -> list[subprocess.Popen[str]]:
    """Start processes as torchrun would."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    local = size == 2  # two as on one host, more as on a host each
    host = {"LOCAL_WORLD_SIZE": str(size)} if local else {}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.quant.ranks",
                json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in job.items()}),
            ],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank * local), **host},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    found = []
    for process in processes:
        try:
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
        found.append(Ended(process.returncode, err))
    return found


def run(size: int, source: Path, folder: Path, names: list[str], **job: Any) -> list[Ended]:
    return ended(start(size, source=source, folder=folder, names=names, **job))


ALL_WELL = Ended(0, "")


def test_two_ranks_make_what_one_process_makes(source, alone, tmp_path):
    names = ["m4 fa", "m2 histogram", "levels", "w8a16"]
    assert run(2, source, tmp_path, names) == [ALL_WELL] * 2
    assert {name: snapshot(tmp_path / name) for name in names} == {name: alone(name) for name in names}


def test_three_ranks_make_what_one_process_makes(source, alone, tmp_path):
    names = ["minmax", "m6 auto kv", "m3 mix kv"]
    assert run(3, source, tmp_path, names) == [ALL_WELL] * 3
    assert {name: snapshot(tmp_path / name) for name in names} == {name: alone(name) for name in names}


def test_two_ranks_share_a_model_with_experts(tmp_path):
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    config = tiny_config("Qwen2MoeForCausalLM", model_type="qwen2_moe", shared_expert_intermediate_size=32, **sizes)
    source, names = write_model(tmp_path / "float", config), ["m4 fa", "levels", "w8a16"]
    assert run(2, source, tmp_path, names) == [ALL_WELL] * 2
    for name in names:
        quantize(source, tmp_path / "alone" / name, name)
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "alone" / name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_recipe_on_more_ranks(source, alone, tmp_path, size):
    assert run(size, source, tmp_path, list(RECIPES)) == [ALL_WELL] * size
    assert {name: snapshot(tmp_path / name) for name in RECIPES} == {name: alone(name) for name in RECIPES}


def test_a_dead_rank_ends_the_others_and_another_number_of_ranks_goes_on(source, alone, tmp_path):
    processes = start(3, source=source, folder=tmp_path, names=["m4 fa"], odd=1, dies=2)  # in layer 1
    processes[1].wait(120)
    died = time.monotonic()
    first, _, last = ended(processes)
    assert time.monotonic() - died < END_SECONDS
    names = [f"rank {rank} (process {processes[rank].pid} on {socket.gethostname()})" for rank in (1, 2)]
    said = (
        f"eightfold: {' or '.join(names)}: got no sign of life: it has died or cannot be reached. So all others end.\n"
    )
    assert first == Ended(2, said)
    assert last == Ended(2, "")
    assert layers_done(read_entries(partial_path(tmp_path / "m4 fa")) or []) in (1, 2)
    assert run(2, source, tmp_path, ["m4 fa"]) == [ALL_WELL] * 2
    assert snapshot(tmp_path / "m4 fa") == alone("m4 fa")


def test_the_error_of_a_rank_is_told_even_if_the_launcher_ends_rank_0_first(source, tmp_path):
    processes = start(2, source=source, folder=tmp_path, names=["minmax"], odd=1, fails=0, waits=1)
    assert processes[1].wait(120) == 2
    processes[0].terminate()
    said = f"eightfold: rank 1 (process {processes[1].pid} on {socket.gethostname()}): sample 7: got nonsense\n"
    assert ended(processes) == [Ended(2, said), Ended(2, "")]


def test_a_dead_rank_0_ends_the_others_and_one_process_goes_on(source, alone, tmp_path):
    processes = start(2, source=source, folder=tmp_path, names=["levels"], odd=0, dies=LAYERS + 2)  # in layer 1
    processes[0].wait(120)
    died = time.monotonic()
    assert ended(processes)[1] == Ended(2, "")
    assert time.monotonic() - died < END_SECONDS
    assert layers_done(read_entries(partial_path(tmp_path / "levels")) or []) == 1
    quantize(source, tmp_path / "levels", "levels")
    assert snapshot(tmp_path / "levels") == alone("levels")


@pytest.mark.parametrize("damaged", ["smoothed-*.f32", "*.safetensors"])
def test_what_one_process_has_begun_and_is_damaged_two_ranks_make_anew(source, alone, tmp_path, monkeypatch, damaged):
    with killed_after(150, monkeypatch):
        quantize(source, tmp_path / "m4 fa", "m4 fa")
    assert 0 < layers_done(read_entries(partial_path(tmp_path / "m4 fa")) or []) < LAYERS
    for file in partial_path(tmp_path / "m4 fa").rglob(damaged):
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    assert run(2, source, tmp_path, ["m4 fa"]) == [ALL_WELL] * 2
    assert snapshot(tmp_path / "m4 fa") == alone("m4 fa")


def test_a_rank_with_another_version_is_refused(source, tmp_path):
    first, second = run(2, source, tmp_path, ["w8a16"], odd=1, version="0.0.1")
    assert first.code == second.code == 2
    assert first.err.startswith("eightfold: eightfold of rank 1 (process ")
    assert "got 0.0.1, expected " in first.err and first.err.count("\n") == 1
    assert second.err == ""
    assert not (tmp_path / "w8a16").exists()


@pytest.mark.parametrize(
    ("name", "kind", "own", "other", "said"),
    [
        ("source", CheckpointError, {"a": [1, 2], "b": [3, 4]}, {"a": [1, 2], "b": [3, 5]},
         "got b [3, 5], expected b [3, 4], as rank 0 has. Let all ranks see the same model directory."),
        ("device", ConfigError, "cpu", None, "got None, expected cpu, as rank 0 has. "
         "Start all processes with the same options."),
        *((name, ConfigError, "1", "2", "got 2, expected 1, as rank 0 has. Use hosts with the same kind of CPU and the "
           "same environment, or start all ranks with ATEN_CPU_CAPABILITY=avx2 and MKL_CBWR=AVX2.")
          for name in float_facts()),
    ],
)  # fmt: skip
def test_what_differs_in_a_rank_is_named(name, kind, own, other, said):
    with pytest.raises(kind) as caught:
        require_alike({name: own}, [("rank 1", {name: own}), ("rank 2", {name: other})], ADVICE)
    assert str(caught.value) == f"{name} of rank 2: {said}"


def test_all_that_decides_the_bytes_is_compared(source, tmp_path):
    class Two(Ranks):
        def require_alike(self, facts):
            seen.update(facts)
            raise ConfigError("enough")

    seen, ranks = {}, Two()
    ranks.size = 2
    with pytest.raises(ConfigError, match="enough"):
        quantize(source, tmp_path / "out", "w8a16", ranks=ranks)
    assert {"eightfold", "torch", "recipe", "calibration", "source", "output", *float_facts()} <= set(seen)
    assert not (tmp_path / "out").exists()


def test_arithmetic_is_compared():
    """The instruction set by its name, and what libraries make of it by results."""
    before = float_facts()
    assert float_facts() == before
    script = "from eightfold.quant.identity import float_facts; print(float_facts()['instruction set'])"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() not in ("", before["instruction set"]), done.stderr


def test_a_rank_that_finds_another_output_is_refused(source, alone, tmp_path, monkeypatch):
    """Its host has a disk of its own, there with a copy of what was begun."""
    out, elsewhere = tmp_path / "shared" / "w8a16", tmp_path / "own"
    with killed_after(100, monkeypatch):
        quantize(source, out, "w8a16")
    shutil.copytree(partial_path(out), partial_path(elsewhere / "w8a16"))
    before = layers_done(read_entries(partial_path(out)) or [])
    assert before > 0
    first, second = run(2, source, out.parent, ["w8a16"], odd=1, elsewhere=elsewhere)
    assert (first.code, second) == (2, Ended(2, ""))
    assert re.fullmatch(
        rf"eightfold: rank 1 \(process \d+ on {re.escape(socket.gethostname())}\): "
        f"output directory {partial_path(elsewhere / 'w8a16')}: "
        "got another one, or none, expected the directory that rank 0 writes to. "
        "OUT has to be one directory that all hosts see: put it on a file system they share.\n",
        first.err,
    )
    assert layers_done(read_entries(partial_path(out)) or []) == before
    assert run(2, source, out.parent, ["w8a16"]) == [ALL_WELL] * 2
    assert snapshot(out) == alone("w8a16")


def torchrun(size: int, *args: object) -> Result:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    done = subprocess.run(
        [*command, "-m", "eightfold", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_torchrun_prints_once(source, cli, tmp_path):
    options = ["--scheme", "w8a8", "--fa-quant", "--calib-texts", "A text.", "--calib-texts", "Another one", "--json"]
    alone = cli("quantize", source, tmp_path / "one", *options)
    assert alone.code == 0
    result = torchrun(2, "quantize", source, tmp_path / "two", *options)
    assert result.code == 0, result.err
    assert result.err.count("note: ") <= alone.err.count("note: ")
    (line,) = result.out.splitlines()
    document = json.loads(line)
    assert (document["world_size"], document["layers"]) == (2, LAYERS)
    assert len(document["ranks_peak_rss_mib"]) == 2
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_torchrun_tells_an_error_once(source, tmp_path):
    result = torchrun(2, "quantize", source, tmp_path / "two", "--scheme", "w8a8", "--calib", tmp_path / "none.txt")
    assert result.code != 0
    assert [line for line in result.err.splitlines() if line.startswith("eightfold: ")] == [
        line for line in result.err.splitlines() if "none.txt" in line and line.startswith("eightfold: ")
    ]
    assert result.err.count("eightfold: ") == 1
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([], 0), ([5], 1), ([100] * 4, 1), ([256] * 16, 8), ([300] * 16, 8), ([2000] * 16, 16), ([3000, 1, 1, 3000], 4)],
)
def test_samples_are_cut_evenly(lengths, count):
    batches = sample_batches(lengths)
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    assert len(batches) == count
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 2048 for batch in batches)
