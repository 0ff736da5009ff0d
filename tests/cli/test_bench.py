"""`eightfold bench`: what it feeds the model, what it makes of the times, what it prints and refuses."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eightfold.errors import CapacityError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native import measure
from eightfold.model.native import model as native_model
from eightfold.model.native.load import load_model
from eightfold.model.native.measure import Measurement, Rates, Runner, Workload, cache_bytes, int8_elements
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.native.models import answer_of
from tests.refusal import error_line, refused

KEYS = {
    "prefill_tok_s",
    "decode_tok_s",
    "output_tok_s",
    "bytes_per_token",
    "read_gb_s",
    "measured_bandwidth_gb_s",
    "bandwidth_fraction",
    "measured_int8_tops",
    "int8_fraction",
    "load_s",
    "peak_rss_mib",
    "isa",
    "threads",
    "batch",
    "prompt_len",
    "new_tokens",
    "repeat",
    "weights_bytes",
    "kv_bytes_per_token",
    "world_size",
    "resident_weights_mib",
}
SMALL = ("--prompt-len", 20, "--new-tokens", 4, "--repeat", 2, "--threads", 2)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """A buffer for the bandwidth that is read at once."""
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A float model, and the same as W8A8 with FAQuant and as W8A16 with C8."""
    folder = tmp_path_factory.mktemp("models")
    source = write_model(folder / "float")
    for name, recipe in {
        "fa": Recipe(QuantType.W8A8, fa_quant=True),
        "c8": Recipe(QuantType.W8A16, kv_int8=True),
        "head": Recipe(QuantType.W8A8_DYNAMIC, quantize_lm_head=True, keep_float=("*.0.mlp.down_proj",)),
    }.items():
        quantize_checkpoint(source, folder / name, recipe, token_samples())
    return {name: folder / name for name in ("float", "fa", "c8", "head")}


@dataclass
class Recorder:
    """Stands between a runner and its model, and remembers every step."""

    model: NativeModel
    steps: list[tuple[list[Chunk], list[int]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, chunks: list[Chunk]) -> tuple[Any, Any]:
        logits, best = self.model.forward(chunks)
        self.steps.append((chunks, best.tolist()))
        return logits, best

    def sequence(self, pages_from: int) -> tuple[list[int], list[int]]:
        """Return what the sequence on these pages was fed, and the likeliest tokens that were asked for."""
        fed, best = [], []
        for chunks, found in self.steps:
            answers = iter(found)
            for chunk in chunks:
                answer = [next(answers)] if chunk.wants else []
                if chunk.pages[0] == pages_from:
                    assert chunk.first_position == len(fed)
                    fed += chunk.token_ids
                    best += answer
        return fed, best


def recorded(path: Path, work: Workload) -> tuple[Recorder, Runner]:
    recorder = Recorder(load_model(Checkpoint.open(path), threads=2))
    return recorder, Runner(recorder, work)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "batch"), [("float", 3), ("fa", 1), ("c8", 3), ("head", 3)])
def test_every_sequence_gets_what_generate_gives(models, monkeypatch, name, batch):
    # Steps of 24 tokens cut and join prompts of 50.
    monkeypatch.setattr(measure, "PREFILL_TOKENS", 24)
    work = Workload(prompt_len=50, new_tokens=6, batch=batch)
    recorder, runner = recorded(models[name], work)
    runner.once()
    alone = load_model(Checkpoint.open(models[name]), threads=1)
    for i in range(batch):
        fed, best = recorder.sequence(i * work.pages)
        answer = answer_of(alone, fed[:50], 6)
        assert best == answer
        assert fed[50:] == answer[:5]
    lengths = [sum(len(chunk.token_ids) for chunk in chunks) for chunks, _ in recorder.steps]
    whole, rest = divmod(50 * batch, 24)
    assert lengths == [24] * whole + [rest] * (rest > 0) + [batch] * 5


def test_prompts_that_run_whole_are_not_cut(models, monkeypatch):
    monkeypatch.setattr(measure, "PREFILL_TOKENS", 24)
    recorder = Recorder(load_model(Checkpoint.open(models["fa"]), threads=2, attention="mindie"))
    Runner(recorder, Workload(prompt_len=50, new_tokens=2, batch=3)).once()  # type: ignore[arg-type]
    assert [[len(chunk.token_ids) for chunk in chunks] for chunks, _ in recorder.steps] == [[50]] * 3 + [[1] * 3]


def test_each_repetition_has_prompts_of_its_own(models):
    recorder, runner = recorded(models["float"], Workload(prompt_len=40, new_tokens=2, batch=2))
    runner.once()
    runner.once()
    prompts = [tuple(chunk.token_ids) for chunks, _ in recorder.steps for chunk in chunks if len(chunk.token_ids) == 40]
    assert len(set(prompts)) == len(prompts) == 4
    assert all(0 <= token < 320 for prompt in prompts for token in prompt)


def test_two_models_get_the_same_prompts(models):
    work = Workload(prompt_len=40, new_tokens=2)
    (one, first), (other, second) = (recorded(models[name], work) for name in ("float", "fa"))
    first.once()
    second.once()
    assert one.sequence(0)[0][:40] == other.sequence(0)[0][:40]


def test_sequences_share_no_page(models):
    work = Workload(prompt_len=PAGE - 2, new_tokens=2, batch=3)
    assert work.pages == 1
    assert Workload(prompt_len=PAGE - 1, new_tokens=2).pages == 2
    recorder, runner = recorded(models["float"], work)
    runner.once()
    last, _ = recorder.steps[-1]
    assert [list(chunk.pages) for chunk in last] == [[0], [1], [2]]
    assert all(a.first_position < b.first_position for (a, *_), (b, *_) in pairwise(c for c, _ in recorder.steps[-2:]))


# --- arithmetic


def test_rates_are_tokens_over_seconds():
    rates = Workload(prompt_len=100, new_tokens=9, batch=4).rates(prefill_s=0.5, decode_s=2.0)
    assert rates == Rates(prefill_tok_s=800.0, decode_tok_s=16.0, output_tok_s=14.4)


def int8_bytes(path: Path, *, head: bool) -> int:
    tensors = load_file(next(path.glob("*.safetensors")))
    weights = {name: t for name, t in tensors.items() if name.endswith(".weight") and t.dtype == torch.int8}
    return sum(t.numel() for name, t in weights.items() if head or "lm_head" not in name)


@pytest.mark.parametrize("name", ["float", "fa", "c8", "head"])
def test_int8_weights_are_those_of_the_layers(models, name):
    found = int8_elements(Checkpoint.open(models[name]))
    assert found == int8_bytes(models[name], head=False)
    assert (found == 0) == (name == "float")


# One page of a layer: keys and values of 2 heads of 16 channels.
@pytest.mark.parametrize(("name", "size"), [("float", 2), ("fa", 1), ("c8", 1)])
def test_a_token_reads_keys_and_values_of_its_context(models, name, size):
    checkpoint = Checkpoint.open(models[name])
    model = load_model(checkpoint, threads=1)
    assert cache_bytes(checkpoint, model.page_bytes, 72.5) == 2 * 2 * 2 * 16 * size * 72.5


def test_a_window_limits_what_a_token_reads(tmp_path):
    source = write_model(tmp_path / "float", tiny_config("MistralForCausalLM", sliding_window=32))
    checkpoint = Checkpoint.open(source)
    page_bytes = load_model(checkpoint, threads=1).page_bytes
    assert cache_bytes(checkpoint, page_bytes, 20) == page_bytes / PAGE * 20
    assert cache_bytes(checkpoint, page_bytes, 72.5) == page_bytes / PAGE * 32


def test_layers_with_wider_elements_weigh_more(tmp_path, monkeypatch):
    source = write_model(tmp_path / "float")
    recipe = Recipe(QuantType.W8A8, fa_quant=True, keep_float=("model.layers.0.self_attn",))
    quantize_checkpoint(source, tmp_path / "out", recipe, token_samples())
    checkpoint = Checkpoint.open(tmp_path / "out")
    page_bytes = load_model(checkpoint, threads=1).page_bytes
    monkeypatch.setattr(measure, "sliding_window", lambda config, layer_idx: 32 if layer_idx else None)
    # Keys and values of 2 heads of 16 channels: layer 0 in bfloat16 without a window, layer 1 in int8.
    assert cache_bytes(checkpoint, page_bytes, 72.5) == 2 * 2 * 16 * (2 * 72.5 + 1 * 32)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_summary_is_medians_and_their_share_of_the_limits(models, batch):
    checkpoint = Checkpoint.open(models["head"])
    model = load_model(checkpoint, threads=1)
    work = Workload(prompt_len=20, new_tokens=4, batch=batch)
    rates = [Rates(1000.0, 10.0, 5.0), Rates(4000.0, 30.0, 6.0), Rates(2000.0, 20.0, 1.0)]
    found = Measurement(rates, read_gb_s=[50.0, 40.0, 30.0], int8_tops=[1.0, 2.0, 4.0], peak_rss_bytes=3 << 20)
    result = measure.summary(found, checkpoint, model, work)
    # The weights: int8, one bfloat16 down_proj of (48, 80); 128 bytes of bfloat16 keys and values a layer and position.
    weights = int8_bytes(models["head"], head=True) + 2 * 48 * 80
    step_bytes = weights + batch * 2 * 128 * 22
    read_gb_s = step_bytes * 20 / batch / 1e9
    assert result == {
        "prefill_tok_s": 2000.0,
        "decode_tok_s": 20.0,
        "output_tok_s": 5.0,
        "bytes_per_token": step_bytes,
        "read_gb_s": read_gb_s,
        "measured_bandwidth_gb_s": 40.0,
        "bandwidth_fraction": read_gb_s / 40,
        "measured_int8_tops": 2.0,
        "int8_fraction": 2 * int8_bytes(models["head"], head=False) * 2000 / 2e12,
        "peak_rss_mib": 3.0,
        "isa": model.isa,
        "threads": 1,
        "batch": batch,
        "prompt_len": 20,
        "new_tokens": 4,
        "repeat": 3,
        "weights_bytes": weights,
        "kv_bytes_per_token": 2 * 128,
        "world_size": 1,
        "resident_weights_mib": model.resident_weights_mib,
    }


def test_limits_and_model_are_measured_in_turn(models, monkeypatch):
    order: list[str] = []

    class Ceiling:
        def __init__(self, threads: int) -> None:
            order.append(f"{threads} threads")

        def read_gb_s(self) -> float:
            order.append("read")
            return 1.0

        def int8_tops(self) -> float:
            order.append("products")
            return 1.0

    monkeypatch.setattr(measure, "Ceiling", Ceiling)
    _, runner = recorded(models["float"], Workload(prompt_len=2, new_tokens=2))
    monkeypatch.setattr(runner, "once", lambda: order.append("model") or Rates(1.0, 1.0, 1.0))
    steps: list[None] = []
    found = measure.measure(runner, 2, lambda: steps.append(None))
    assert order == ["model", "2 threads", *["read", "products", "model"] * 2]
    assert (len(found.rates), len(found.read_gb_s), len(found.int8_tops), len(steps)) == (2, 2, 2, 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_limits_of_this_machine_are_found(threads):
    limits = measure.Ceiling(threads)
    assert 0 < limits.read_gb_s() < 1e5
    assert 0 < limits.int8_tops() < 1e4


# --- the command


@pytest.mark.parametrize(("name", "batch"), [("float", 1), ("fa", 2), ("c8", 1), ("head", 2)])
def test_bench_gives_json(cli, models, name, batch):
    shown = cli("bench", models[name], *SMALL, "--batch", batch, "--json")
    assert (shown.code, shown.err) == (0, "")
    found = shown.json()
    assert found.keys() == KEYS
    assert (found["batch"], found["prompt_len"], found["new_tokens"], found["repeat"]) == (batch, 20, 4, 2)
    assert found["threads"] == 2
    assert (found["world_size"], len(found["resident_weights_mib"])) == (1, 1)
    others = {"isa", "int8_fraction", "read_gb_s", "bandwidth_fraction", "resident_weights_mib"}
    assert all(found[key] > 0 for key in KEYS - others)
    assert found["int8_fraction"] == 0 or name != "float"


def test_bench_tells_what_a_draft_model_saves(cli, models):
    options = (*SMALL, "--batch", 2, "--draft-model", models["float"], "--draft-tokens", 2)
    found = cli("bench", models["fa"], *options, "--json").json()
    assert found.keys() == KEYS | {"draft"}
    assert found["draft"].keys() == {"code", "prose"}
    for gain in found["draft"].values():
        assert gain["identical"] is True
        assert 0 < gain["model_accepted"] <= gain["model_drafted"]
        assert gain["tokens_per_pass"] > 1
        assert min(gain["plain_tok_s"], gain["draft_tok_s"], gain["draft_ratio"]) > 0
    shown = cli("bench", models["fa"], *options)
    assert [line.split()[:2] for line in shown.out.splitlines()[-2:]] == [["guesses", "code"], ["guesses", "prose"]]


def test_bench_computes_as_it_is_told(cli, models, monkeypatch):
    from eightfold.model.native import load

    told = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **options: told.append(options) or real(*args, **options))
    cli("bench", models["fa"], *SMALL, "--attention-mode", "mindie", "--dynamic", "symmetric", "--json").json()
    computing = {"threads": 2, "dynamic": "symmetric", "attention": "mindie", "longest": None, "expert_parallel": False}
    assert told == [{**computing, "beside": None}]


def test_bench_prints_limits_first(cli, models):
    shown = cli("bench", models["fa"], *SMALL)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{models['fa']}: W8A8, ")
    assert ", 2 threads; loaded in " in lines[0]
    assert lines[1] == "1 sequence, 20 tokens in, 4 out; median of 2 (least to most)"
    words = [line.split() for line in lines[3:]]
    assert [row[:2] for row in words[:3]] == [["limits", "reading"], ["int8", "products"], ["reached", "prefill"]]
    assert [row[0] for row in words[3:]] == ["decode", "output"]


def test_threads_come_from_the_environment_too(cli, models, monkeypatch):
    monkeypatch.setenv("EIGHTFOLD_THREADS", "3")
    monkeypatch.setenv("EIGHTFOLD_ISA", "scalar")
    options = ("--prompt-len", 2, "--new-tokens", 2, "--repeat", 1, "--json")
    found = cli("bench", models["fa"], *options).json()
    assert (found["threads"], found["isa"]) == (3, "scalar")
    assert cli("bench", models["fa"], *options, "--threads", 1).json()["threads"] == 1


def test_a_prompt_beyond_the_context_is_refused(cli, models):
    message = refused(cli, "bench", models["fa"], "--prompt-len", 100, "--new-tokens", 29, within=models["fa"])
    assert message == (
        "context: got 100 tokens in and 29 out, expected at most 128 together, which is all this model can look back "
        "on. Lower --prompt-len or --new-tokens."
    )
    assert cli("bench", models["fa"], "--prompt-len", 100, "--new-tokens", 28, "--repeat", 1, "--json").code == 0


def test_a_cache_beyond_the_memory_is_refused(cli, models, monkeypatch):
    page = load_model(Checkpoint.open(models["float"]), threads=1).page_bytes
    monkeypatch.setattr(native_model, "available_bytes", lambda: 40 * page - 1)
    message = error_line(cli("bench", models["float"], *SMALL, "--batch", 40))
    assert message == (
        "key/value cache: got 1 MiB for 5120 positions, expected at most 1 MiB, which are free. "
        "Lower --batch, --prompt-len or --new-tokens."
    )
    monkeypatch.setattr(native_model, "available_bytes", lambda: 40 * page)
    assert cli("bench", models["float"], *SMALL, "--batch", 40).code == 0


def test_a_machine_without_room_for_the_buffer_is_refused(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: measure.READ_BYTES - 1)
    with pytest.raises(CapacityError, match="buffer to measure the bandwidth with: got 1 MiB of free memory, expected"):
        measure.Ceiling(1)


def test_a_system_that_does_not_say_what_is_free_is_tried(models, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: None)
    measure.Ceiling(1)
    recorded(models["float"], Workload(prompt_len=2, new_tokens=2))


def test_one_new_token_has_no_rate(cli, models):
    message = error_line(cli("bench", models["fa"], "--new-tokens", 1))
    assert message.startswith("--new-tokens: got 1, expected a whole number of at least 2")


def test_bench_without_the_extension_says_what_to_do(cli, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "eightfold.model.native._core", None)
    message = error_line(cli("bench", models["fa"], *SMALL))
    assert message.startswith("native backend: got no compiled extension (")
    assert "Install a C++ compiler and reinstall eightfold" in message
