"""Random checkpoints: the right shapes, the same bytes for the same seed, and a model that behaves like one."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from eightfold.config import DType, parse_config
from eightfold.errors import ConfigError, OutputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import JOURNAL_NAME
from eightfold.format.shards import ShardedWriter
from eightfold.model.reference.decoder import apply_block_
from eightfold.model.reference.load import Decoder
from eightfold.synth import checkpoint as synth_checkpoint
from eightfold.synth import shapes, tensors
from eightfold.synth.checkpoint import RandomModel, synthesize
from eightfold.synth.named import NamedModel
from eightfold.synth.tensors import RandomTensor
from eightfold.tokenizer import Tokenizer
from tests.refusal import error_line, quantize_refused

SMALL = {
    **shapes.MODELS["llama3.2-1b"],
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "bos_token_id": 300,
    "eos_token_id": 301,
}


SMALL_SIZES = {key: value for key, value in SMALL.items() if isinstance(value, int)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Models of real names and small sizes, in several pieces and files."""
    monkeypatch.setitem(shapes.MODELS, "llama3.2-1b", SMALL)
    untied = {**shapes.MODELS["qwen2-7b"], **{key: SMALL[key] for key in SMALL if key.endswith(("size", "heads"))}}
    monkeypatch.setitem(shapes.MODELS, "qwen2-7b", {**untied, "bos_token_id": 300, "eos_token_id": 300})
    monkeypatch.setattr(tensors, "PIECE", 1 << 12)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    # as published with the models
    [("llama3-70b", 70_553_706_496), ("llama3-8b", 8_030_261_248), ("qwen3-30b-a3b", 30_532_122_624)],
)
def test_shapes_are_the_real_ones(name, parameters):
    model = RandomModel(parse_config(shapes.model_config(name, None, DType.BF16), Path("config.json")), 0)
    assert sum(int(np.prod(tensor.shape)) for tensor in model.tensors()) == parameters


def test_shapes_of_the_models_made_small_above_are_the_real_ones(monkeypatch):
    monkeypatch.undo()
    for name, parameters in (("llama3.2-1b", 1_235_814_400), ("qwen2-7b", 7_615_616_512)):
        model = RandomModel(parse_config(shapes.model_config(name, None, DType.BF16), Path("config.json")), 0)
        assert sum(int(np.prod(tensor.shape)) for tensor in model.tensors()) == parameters


def test_a_directory_opens_and_has_the_asked_layers(cli, tmp_path):
    made = cli("synth", "--like", "qwen2-7b", "--layers", 3, tmp_path / "out")
    assert (made.code, made.err) == (0, "")
    assert made.out.startswith(f"{tmp_path / 'out'}: 3 layers like qwen2-7b, bf16, ")
    found = Checkpoint.open(tmp_path / "out")
    assert (found.config.num_layers, found.dtype) == (3, DType.BF16)
    assert "model.layers.2.self_attn.q_proj.bias" in found.tensors


def test_bytes_depend_on_the_seed_and_not_on_threads(tmp_path):
    for name, seed, threads in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        synthesize("llama3.2-1b", tmp_path / name, seed=seed, threads=threads)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert sorted(name for name in a if a[name] != c[name]) == [JOURNAL_NAME, "model.safetensors"]


def test_large_models_come_in_parts_with_an_index(tmp_path, monkeypatch):
    synthesize("llama3.2-1b", tmp_path / "one")
    monkeypatch.setattr(synth_checkpoint, "SHARD_BYTES", 200_000)
    synthesize("llama3.2-1b", tmp_path / "many")
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len({info.file.name for info in many.tensors.values()}) > 3
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert all(np.array_equal(one.array(name), many.array(name)) for name in one.tensors)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama3.2-1b", DType.BF16), ("llama3.2-1b", DType.F16), ("qwen3-30b-a3b", DType.BF16)],
)
def test_hidden_states_stay_sane_and_outliers_stand_out(tmp_path, monkeypatch, name, dtype):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    monkeypatch.setitem(shapes.MODELS, "qwen3-30b-a3b", {**shapes.MODELS["qwen3-30b-a3b"], **SMALL_SIZES, **experts})
    synthesize(name, tmp_path / "out", dtype=dtype)
    decoder = Decoder(Checkpoint.open(tmp_path / "out"))
    hidden = decoder.embed(list(range(256)))
    for layer_idx in range(SMALL["num_hidden_layers"]):
        block = decoder.block(layer_idx)
        read = block.norms["input_layernorm"](hidden).square().mean(0).sqrt()
        # Planted between 20 and 100. Two of 128 channels being LOUD = 6 lowers the others by (1 + 2 * 35 / 128)**0.5
        # and moves nothing relative to them; the rest is chance: 256 tokens, gains of 10 %, few rows.
        assert 10 < float(read.max() / read.median()) < 200
        apply_block_(block, hidden, [256], decoder.turns())
    # About 1 by design, times 1.24 for the two LOUD channels of 128; what it must not do is vanish or explode.
    assert 0.2 < float(hidden.std()) < 5
    logits = decoder.head()(hidden)
    assert bool(torch.isfinite(logits).all())
    assert 0.3 < float(logits.std()) < 10


def test_ordinary_values_are_normal():
    table = tensors._quantiles()
    assert np.array_equal(np.sort(table), -np.sort(table)[::-1])
    # 65,536 midpoints miss the tails beyond 4.3 deviations: 1e-4 of the variance at most.
    assert abs(float(table.std(dtype=np.float64)) - 1) < 1e-4


def test_a_piece_of_a_tensor_has_its_rows_and_columns_planted():
    model = RandomModel(parse_config(SMALL, Path("config.json")), 0)
    rows, columns = {5: 8.0}, {2: 4.0}
    plain = model.values(RandomTensor("x", (8, 16), 0.5), range(4, 8), DType.F32)
    planted = model.values(RandomTensor("x", (8, 16), 0.5, rows=rows, columns=columns), range(4, 8), DType.F32)
    expected = plain.copy()
    expected[:, 2] *= 4
    expected[1] = plain[1] * 8
    assert np.array_equal(planted, expected)


def test_rounding_is_that_of_torch():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    tie = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # halfway between bfloat16 numbers
    values = np.concatenate([values, tie])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(tensors.stored(values, DType.BF16), expected)


def test_the_tokenizer_takes_every_byte_and_fills_the_vocabulary(tmp_path):
    synthesize("llama3.2-1b", tmp_path / "out", layers=1)
    tokenizer = Tokenizer(tmp_path / "out")
    text = "Grüße \U0001f600\n\x00"
    ids = tokenizer.encode(text)
    assert ids[0] == SMALL["bos_token_id"]
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text
    assert [tokenizer.piece(i) is None for i in (0, 399, 400)] == [False, False, True]
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert chat[:2] == [300, 303]
    assert chat.count(304) == 1
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 301


def test_too_many_layers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^layers: got 7, expected 1 to 6, as llama3.2-1b has$"):
        synthesize("llama3.2-1b", tmp_path / "out", layers=7)
    assert not list(tmp_path.iterdir())


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^like: got gpt-2, expected llama3-70b, llama3-8b, llama3.2-1b, qwen2-7b, "):
        synthesize("gpt-2", tmp_path / "out")


def test_a_short_disk_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(OutputError, match=r"^disk space for .*: got 1.0 MB free, expected 69.2 MB"):
        synthesize("llama3.2-1b", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantize_into_a_synthetic_model_does_not_advise_what_it_would_refuse(cli, tmp_path):
    target = tmp_path / "out"
    synthesize("llama3.2-1b", tmp_path / "source")
    synthesize("llama3.2-1b", target)
    assert quantize_refused(cli, tmp_path / "source") == (
        f"output directory {target}: got a model made otherwise (command: synth -> quantize), "
        "expected the same recipe and source. Choose another directory."
    )
    assert quantize_refused(cli, tmp_path / "source", "--overwrite").endswith("or choose another directory.")


def test_a_file_that_is_too_large_for_the_limit_is_said_in_one_line(cli, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # the tokenizer alone is larger
    try:
        result = cli("synth", "--like", "llama3.2-1b", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error_line(result).startswith("File too large")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    written = []

    def fail(self, name, array):
        written.append(name)
        if len(written) == 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardedWriter, "append", fail)
    with pytest.raises(OSError, match="No space"):
        synthesize("llama3.2-1b", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- families that are only quantized

NARROW = {
    "vocab_size": 400,
    "hidden_size": 144,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 300,
    "eos_token_id": 301,
    "num_experts_per_tok": 2,
}
NARROW_OF = {
    "qwen3-30b-a3b": {"num_experts": 4},
    "deepseek-v3": {"n_routed_experts": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "first_k_dense_replace": 1},
    "glm-4.5-air": {"n_routed_experts": 4},
    "qwen3.5-35b-a3b": {"num_experts": 4, "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2},
}


@pytest.mark.parametrize("name", NARROW_OF)
def test_mixtures_of_experts_have_their_names(cli, tmp_path, monkeypatch, name):
    raw = shapes.MODELS[name]
    small = {**raw.get("text_config", raw), **NARROW, **NARROW_OF[name]}
    monkeypatch.setitem(shapes.MODELS, name, {**raw, "text_config": small} if "text_config" in raw else small)
    layers = 4 if "text_config" in raw else 2
    made = synthesize(name, tmp_path / "m", layers=layers)
    assert made.layers == layers
    assert (cli("quantize", tmp_path / "m", tmp_path / "out", "--scheme", "w8a8-dynamic").code) == 0
    done = cli("check", tmp_path / "out", "--json")
    assert done.code == 0
    reports = {report["loader"]: report for report in json.loads(done.out)["reports"]}
    rules = {finding["rule"] for finding in reports["vllm-ascend"]["findings"]}
    assert rules == set()
    counted = sum(reports["vllm-ascend"]["summary"]["packs"]["experts"].values())
    assert counted == layers - (name in ("deepseek-v3", "glm-4.5-air"))


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published; of DeepSeek without its scales, and with the layer behind the last
    [
        ("deepseek-v3", 684_489_845_504),
        ("glm-4.5-air", 110_468_824_832),
    ],
)
def test_shapes_of_families_that_are_only_quantized_are_the_real_ones(name, parameters):
    made = NamedModel(shapes.MODELS[name], 0).tensors()
    assert sum(math.prod(t.shape) for t in made if not t.name.endswith("_scale_inv")) == parameters


def test_float8_is_that_of_torch():
    values = np.linspace(-448, 448, 100_003, dtype=np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn)
    found = torch.from_numpy(tensors.stored(values, DType.F8_E4M3)).view(torch.float8_e4m3fn)
    assert (
        (found.float() - torch.from_numpy(values)).abs().le((expected.float() - torch.from_numpy(values)).abs()).all()
    )
