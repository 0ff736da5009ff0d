"""What quantize_checkpoint() leaves on disk."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.config import DType
from eightfold.errors import CheckpointError, ConfigError, OutputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor, mapped_tensor, to_array
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.plan import OutputPlan, assign_types
from eightfold.quant.recipe import Recipe
from eightfold.scheme import SCHEMES, QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.refusal import error_line

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = "model.layers.1"
SAMPLES = token_samples()


def quantized(tmp_path, config=None, scheme=QuantType.W8A8, name="out", **recipe):
    source = tmp_path / f"{name}-float"
    write_model(source, config or tiny_config(), tokenizer=False)
    options = {key: recipe.pop(key) for key in ("part_bytes", "legacy_names", "overwrite") if key in recipe}
    outcome = quantize_checkpoint(source, tmp_path / name, Recipe(scheme, **recipe), SAMPLES, **options)
    return Checkpoint.open(tmp_path / name), outcome


def dtypes(checkpoint, module):
    return {
        name.rpartition(".")[2]: info.dtype
        for name, info in checkpoint.tensors.items()
        if name.startswith(f"{module}.")
    }


# The published tables: what each scheme stores for a linear with a bias, by the model's dtype.
@pytest.mark.parametrize(
    ("scheme", "model", "expected"),
    [
        (QuantType.W8A8, "float16", {"input_scale": "F16", "input_offset": "F16", "deq_scale": "I64", "bias": "F16"}),
        (
            QuantType.W8A8,
            "bfloat16",
            {"input_scale": "BF16", "input_offset": "BF16", "deq_scale": "F32", "bias": "BF16"},
        ),
        (QuantType.W8A8, "float32", {"input_scale": "F32", "input_offset": "F32", "deq_scale": "I64", "bias": "F32"}),
        (QuantType.W8A16, "float16", {"bias": "F16"}),
        (QuantType.W8A16, "bfloat16", {"bias": "F32"}),
        (QuantType.W8A8_DYNAMIC, "float16", {"bias": "F16"}),
        (QuantType.W8A8_DYNAMIC, "bfloat16", {"bias": "BF16"}),
    ],
)
def test_dtypes_follow_the_published_tables(tmp_path, scheme, model, expected):
    checkpoint, _ = quantized(tmp_path, tiny_config("Qwen2ForCausalLM", torch_dtype=model), scheme)
    common = {"weight": "I8", "weight_scale": "F32", "weight_offset": "F32"}
    static = {"quant_bias": "I32"} if scheme is QuantType.W8A8 else {}
    assert dtypes(checkpoint, f"{LAYER}.self_attn.q_proj") == {**common, **static, **expected}
    short = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[model]
    assert checkpoint.tensors["model.norm.weight"].dtype == short
    assert checkpoint.tensors["lm_head.weight"].dtype == short


@pytest.mark.parametrize(("model", "deq"), [("float16", "I64"), ("bfloat16", "F32")])
def test_save_dtype_float32_widens_every_float_but_not_the_packing(tmp_path, model, deq):
    config = tiny_config("Qwen2ForCausalLM", torch_dtype=model)
    checkpoint, _ = quantized(tmp_path, config, save_float32=True, keep_float=("*.o_proj",))
    floats = {info.dtype for info in checkpoint.tensors.values() if info.dtype not in ("I8", "I32", "I64")}
    assert floats == {"F32"}
    assert checkpoint.tensors[f"{LAYER}.mlp.up_proj.deq_scale"].dtype == deq
    assert checkpoint.config_raw["torch_dtype"] == checkpoint.config_raw["dtype"] == model


@pytest.mark.parametrize("model", ["float16", "bfloat16"])
def test_values_are_rounded_once(tmp_path, model):
    config = tiny_config(torch_dtype=model)
    wide, _ = quantized(tmp_path, config, name="wide", save_float32=True)
    narrow, _ = quantized(tmp_path, config, name="narrow")
    dtype = getattr(torch, model)
    for name in (f"{LAYER}.mlp.down_proj.input_scale", f"{LAYER}.self_attn.k_proj.input_offset"):
        assert torch.equal(load_tensor(narrow, name), load_tensor(wide, name).to(dtype))


@pytest.mark.parametrize("model", ["float16", "bfloat16"])
def test_deq_scale_belongs_to_the_stored_input_scale(tmp_path, model):
    checkpoint, _ = quantized(tmp_path, tiny_config(torch_dtype=model))
    deq = load_tensor(checkpoint, f"{LAYER}.mlp.up_proj.deq_scale")
    if model == "float16":
        deq = deq.to(torch.int32).view(torch.float32)
    scale = load_tensor(checkpoint, f"{LAYER}.mlp.up_proj.input_scale").float()
    assert torch.equal(deq, scale * load_tensor(checkpoint, f"{LAYER}.mlp.up_proj.weight_scale")[:, 0])


def test_linears_with_one_input_share_its_parameters(tmp_path):
    checkpoint, _ = quantized(tmp_path)
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for suffix in ("input_scale", "input_offset"):
            values = {load_tensor(checkpoint, f"{LAYER}.{name}.{suffix}").item() for name in names}
            assert len(values) == 1


def test_bias_is_folded_and_kept(tmp_path):
    checkpoint, _ = quantized(tmp_path, tiny_config("Qwen2ForCausalLM", torch_dtype="float32"))
    source = Checkpoint.open(tmp_path / "out-float")
    name = f"{LAYER}.self_attn.q_proj"
    bias = load_tensor(checkpoint, f"{name}.bias")
    assert torch.equal(bias, load_tensor(source, f"{name}.bias"))
    assert checkpoint.description.tags[f"{name}.bias"] == "FLOAT"
    deq = load_tensor(checkpoint, f"{name}.deq_scale").to(torch.int32).view(torch.float32)
    sums = load_tensor(checkpoint, f"{name}.weight").sum(1, dtype=torch.int64)
    offset = load_tensor(checkpoint, f"{name}.input_offset")
    want = torch.round(bias.double() / deq.double() - offset.double() * sums.double())
    assert torch.equal(load_tensor(checkpoint, f"{name}.quant_bias").double(), want)


def test_tied_model_has_both_names_and_stays_tied(tmp_path):
    checkpoint, _ = quantized(tmp_path, tiny_config(tie_word_embeddings=True), QuantType.W8A16)
    assert checkpoint.config_raw["tie_word_embeddings"] is True
    head, embedding = (load_tensor(checkpoint, f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding)
    assert checkpoint.head_weight() == "model.embed_tokens.weight"


def test_tied_model_with_another_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path / "float", tiny_config(tie_word_embeddings=True))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "equal", Recipe(QuantType.W8A16))
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight in .*: got values that differ .*tie_word_embeddings"):
        quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A16))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", list(SCHEMES.values()))
def test_kept_linears_are_bit_equal_and_tagged_float(tmp_path, scheme):
    checkpoint, outcome = quantized(
        tmp_path, None, scheme, keep_float=("*.down_proj", "model.layers.0.self_attn.?_proj")
    )
    source = Checkpoint.open(tmp_path / "out-float")
    kept = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    kept += [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert sorted(outcome.kept_float) == sorted(kept)
    assert outcome.quantized == 14 - len(kept)
    for name in kept:
        assert checkpoint.quant_type(name) is QuantType.FLOAT
        assert dtypes(checkpoint, name) == {"weight": "BF16"}
        assert torch.equal(load_tensor(checkpoint, f"{name}.weight"), load_tensor(source, f"{name}.weight"))


def test_splitting_a_group_is_noted(tmp_path):
    _, outcome = quantized(tmp_path, keep_float=("*.q_proj",))
    assert any("2 groups of linears that share an input" in note and "layer 0" in note for note in outcome.notes)


def test_all_linears_float_is_the_float_model(tmp_path):
    checkpoint, _ = quantized(tmp_path, keep_float=("*",))
    tokens = SAMPLES[0]
    want = Decoder(Checkpoint.open(tmp_path / "out-float")).logits(tokens)
    assert torch.equal(Decoder(checkpoint).logits(tokens), want)


@pytest.mark.parametrize("scheme", list(SCHEMES.values()))
def test_quantized_logits_stay_near_the_float_ones(tmp_path, scheme):
    checkpoint, _ = quantized(tmp_path, None, scheme)
    tokens = SAMPLES[0]
    want = Decoder(Checkpoint.open(tmp_path / "out-float")).logits(tokens)
    got = Decoder(checkpoint).logits(tokens)
    # int8 has an error of about 1/255 of the range, 1/100 of the deviation; two layers and the head keep it below 1/5.
    assert (got - want).std() < 0.2 * want.std()
    assert not torch.equal(got, want)


def test_shards_hold_every_tensor_once_and_the_index_says_where(tmp_path):
    checkpoint, _ = quantized(tmp_path, None, QuantType.W8A16, part_bytes=20_000)
    index = json.loads((tmp_path / "out" / "quant_model_weight_w8a16.safetensors.index.json").read_text())
    files = {info.file.name for info in checkpoint.tensors.values()}
    assert len(files) > 2
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())
    assert all(name.startswith("quant_model_weight_w8a16-0000") for name in files)
    whole, _ = quantized(tmp_path, None, QuantType.W8A16, name="whole")
    for name in whole.tensors:
        assert torch.equal(load_tensor(whole, name), load_tensor(checkpoint, name))


def test_legacy_names_add_the_suffixed_description_and_quantize(tmp_path):
    checkpoint, _ = quantized(tmp_path, legacy_names=True)
    short, suffixed = (tmp_path / "out" / f"quant_model_description{s}.json" for s in ("", "_w8a8"))
    assert short.read_bytes() == suffixed.read_bytes()
    assert checkpoint.config_raw["quantize"] == "w8a8"


def test_without_legacy_names_config_json_says_nothing_of_quantization(tmp_path):
    checkpoint, _ = quantized(tmp_path)
    assert not {"quantize", "quantization_config"} & set(checkpoint.config_raw)
    assert [path.name for path in (tmp_path / "out").glob("quant_model_description*")] == [
        "quant_model_description.json"
    ]


def test_source_is_only_read(tmp_path, float_model):
    def digest():
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in float_model.iterdir()}

    before = digest()
    quantize_checkpoint(float_model, tmp_path / "out", Recipe(QuantType.W8A8), SAMPLES)
    assert digest() == before


def test_same_input_gives_the_same_bytes(tmp_path):
    first, _ = quantized(tmp_path, name="a")
    second, _ = quantized(tmp_path, name="b")
    name = "quant_model_weight_w8a8.safetensors"
    assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


def test_static_w8a8_without_samples_is_refused(tmp_path, float_model):
    with pytest.raises(ConfigError, match="calibration samples for W8A8: got none"):
        quantize_checkpoint(float_model, tmp_path / "out", Recipe(QuantType.W8A8))
    assert not (tmp_path / "out").exists()


def test_quantized_source_is_refused(tmp_path):
    checkpoint, _ = quantized(tmp_path)
    with pytest.raises(CheckpointError, match="got a quantized one, expected float weights"):
        quantize_checkpoint(checkpoint.directory, tmp_path / "again", Recipe(QuantType.W8A16))


def test_norm_kept_in_float32_stays_float32(tmp_path):
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A16))
    assert Checkpoint.open(tmp_path / "out").tensors["model.norm.weight"].dtype == "F32"


def test_plan_is_in_module_order(float_model):
    checkpoint = Checkpoint.open(float_model)
    recipe = Recipe(QuantType.W8A8)
    names = list(OutputPlan(checkpoint, recipe, assign_types(checkpoint.config, recipe), ()).tensors)
    assert names[0] == "model.embed_tokens.weight"
    assert names[1:8] == [
        f"model.layers.0.self_attn.q_proj.{suffix}"
        for suffix in (
            "weight",
            "weight_scale",
            "weight_offset",
            "input_scale",
            "input_offset",
            "quant_bias",
            "deq_scale",
        )
    ]
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_float32_model_keeps_the_packed_form():
    assert DType.F32.is_float
    assert not DType.I64.is_float


@pytest.mark.parametrize("said", ["float32", "auto", "torch.float32", None])
def test_a_config_that_names_no_16_bit_dtype_leaves_it_to_the_weights(cli, tmp_path, said):
    source = write_model(tmp_path / "float", tiny_config(torch_dtype="bfloat16"))
    (source / "config.json").write_text(json.dumps(tiny_config(torch_dtype=said, model_type=None)))
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic")
    assert made.code == 0
    assert "MindIE refuses" not in made.err
    found, config = Checkpoint.open(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"], config["model_type"]) == ("bfloat16", "bfloat16", "llama")
    assert {info.dtype for info in found.tensors.values()} == {"BF16", "I8", "F32"}


@pytest.mark.parametrize(
    ("name", "stored", "packed", "said"),
    [("bf16", "BF16", "F32", "bfloat16"), ("fp16", "F16", "I64", "float16"), ("fp32", "F32", "I64", "float32")],
)
@pytest.mark.parametrize("source_dtype", ["bfloat16", "float32"])
def test_the_output_has_the_dtype_that_is_asked_for(cli, tmp_path, source_dtype, name, stored, packed, said):
    source = write_model(tmp_path / "float", tiny_config(torch_dtype=source_dtype))
    options = ("--scheme", "w8a8", "--anti-outlier", "m4", "--dtype", name, "--calib-limit", "4")
    made = cli("quantize", source, tmp_path / "out", *options)
    assert made.code == 0, made.err
    out, float_model = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == (said, said)
    q_proj = "model.layers.0.self_attn.q_proj"
    kinds = {name: out.tensors[f"{q_proj}.{name}"].dtype for name in ("weight", "input_scale", "deq_scale")}
    assert kinds == {"weight": "I8", "input_scale": stored, "deq_scale": packed}
    embedding = "model.embed_tokens.weight"
    assert out.tensors[embedding].dtype == stored
    expected = to_array(mapped_tensor(float_model, embedding), DType(stored))
    assert out.array(embedding).tobytes() == expected.tobytes()
    assert made.err.count("MindIE refuses") == (name == "fp32")


def test_what_float16_cannot_hold_is_refused_before_anything_is_lost(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config(torch_dtype="bfloat16"))
    tensors = load_file(str(source / "model.safetensors"))
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, str(source / "model.safetensors"))
    message = error_line(cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--dtype", "fp16"))
    assert message.startswith(f"values of model.norm.weight in {source}: got ")
    assert message.endswith("Store float32 (--save-dtype), or choose another --dtype.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_a_note_that_is_known_before_the_work_is_told_before_it(cli, tmp_path, monkeypatch):
    source = write_model(tmp_path / "float", tiny_config(torch_dtype="float32"))

    def fail(*args, **options):
        raise OutputError("enough")

    monkeypatch.setattr("eightfold.quant.pipeline.quantize_checkpoint", fail)
    refused = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16")
    assert refused.err.index("OUT is a float32 model, which MindIE refuses: --dtype bf16") < refused.err.index("enough")
