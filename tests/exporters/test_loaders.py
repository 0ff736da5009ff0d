"""What users bring, as MindIE and vllm-ascend read it after repair; and what stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eightfold.check.directory import RawDirectory
from eightfold.errors import EightfoldError
from eightfold.exporters import ExportOptions, plan_export
from eightfold.exporters.loaders import CHECKS
from eightfold.format import streaming
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import partial_path
from eightfold.progress import silent
from tests.check import (
    DOWN,
    LAYERS,
    Case,
    K,
    O,
    Q,
    Toy,
    V,
    all_of,
    case,
    fill,
    leave_float_shard,
    remove_tokenizer,
    rename_description,
    store_as,
    times,
    write,
)
from tests.check.test_mindie import ATTENTION_CASES, CONFIG_CASES, LABEL_CASES, MIXED_CASES, TENSOR_CASES

LOADERS = tuple(CHECKS)
STATIC = ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale")


def convert(toy: Toy, loader: str, *, lossy: bool = False, **options: Any) -> tuple[Path, list[str], list[str]]:
    """Return the directory, what was repaired and what is lost."""
    plan = plan_export(toy.path, loader, ExportOptions(**options), lossy=lossy)
    target = toy.path.parent / "out"
    assert not plan.write(target, overwrite=False, progress=silent)
    return target, list(plan.notes), list(plan.losses)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(str(next(path.glob("*.safetensors"))))


def require_harmless(path: Path, loader: str) -> None:
    report = CHECKS[loader](RawDirectory.open(path))
    assert report.verdict.is_harmless, report.findings
    Checkpoint.open(path)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a8-mix", "w8a16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_directory_without_faults_keeps_every_byte(tmp_path, loader, scheme, dtype):
    toy = Toy(tmp_path, scheme, dtype)
    out, notes, losses = convert(toy, loader)
    assert notes == ["nothing has to be repaired."] and losses == []
    assert_same(stored(out), toy.load())
    assert json.loads((out / "config.json").read_text()) == json.loads((toy.path / "config.json").read_text())
    assert json.loads((out / toy.description.name).read_text()) == json.loads(toy.description.read_text())
    require_harmless(out, loader)


# Repairs after which every number is the one that the writer meant.
EXACT = [
    case("a suffixed description", rename_description("quant_model_description_w8a8.json")),
    case("no description", lambda t: t.description.unlink()),
    case("a damaged description", write("quant_model_description.json", "{")),
    case("labels of another type", lambda t: t.describe({f"{name}.weight": "W8A8_DYNAMIC" for name in (Q, K, V)})),
    case("float entries missing", lambda t: t.describe({"model.norm.weight": ..., "lm_head.weight": ...})),
    case("no weight_offset", lambda t: t.remove(*[name for name in t.load() if name.endswith("weight_offset")])),
    case("no deq_scale", lambda t: t.remove(f"{O}.deq_scale")),
    case("no quant_bias", lambda t: t.remove(f"{O}.quant_bias")),
    case("float32 deq_scale", lambda t: t.change({f"{O}.deq_scale": bits(t, f"{O}.deq_scale")})),
    case("no model_quant_type", lambda t: t.describe({"model_quant_type": ...})),
    case("a scalar", lambda t: t.change({f"{O}.input_scale": t.load()[f"{O}.input_scale"][0]})),
    case("a float shard left over", leave_float_shard),
    case("an older config", lambda t: t.configure(quantize="w8a8", quantization_config={"group_size": 0})),
    case("no model_type", lambda t: t.configure(model_type=...)),
    case("a damaged generation config", write("generation_config.json", "[]")),
]


def bits(toy: Toy, name: str) -> torch.Tensor:
    """Return a packed deq_scale as float32."""
    return toy.load()[name].to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_repairs_that_cost_nothing(tmp_path, loader, case: Case):
    toy = Toy(tmp_path)
    expected = toy.load()
    case.change(toy)
    out, notes, losses = convert(toy, loader)
    assert losses == [] and notes != ["nothing has to be repaired."]
    assert_same(stored(out), expected)
    require_harmless(out, loader)


def test_a_weight_scale_that_was_left_out_is_made(tmp_path):
    toy = Toy(tmp_path)
    expected = toy.load()[f"{O}.weight_scale"]
    toy.remove(f"{O}.weight_scale", f"{O}.weight_offset")
    out, _, _ = convert(toy, "mindie")
    torch.testing.assert_close(stored(out)[f"{O}.weight_scale"], expected, rtol=1e-6, atol=0)


def test_a_bias_that_was_left_out_is_made_of_quant_bias(tmp_path):
    toy = Toy(tmp_path, architecture="Qwen2ForCausalLM")
    before = toy.load()
    toy.remove(f"{Q}.bias")
    out, _, losses = convert(toy, "vllm-ascend")
    after = stored(out)
    deq = before[f"{Q}.deq_scale"].to(torch.int32).view(torch.float32)
    assert losses == []
    assert ((after[f"{Q}.bias"].float() - before[f"{Q}.bias"].float()).abs() <= deq).all()
    assert torch.equal(after[f"{Q}.quant_bias"], before[f"{Q}.quant_bias"])


@pytest.mark.parametrize("loader", LOADERS)
def test_one_range_for_linears_that_become_one(tmp_path, loader):
    toy = Toy(tmp_path)
    times(1.5, f"{K}.input_scale")(toy)
    before = toy.load()
    out, _, losses = convert(toy, loader, lossy=True)
    after = stored(out)
    assert len(losses) == 1 and "input_scale" in losses[0]
    scales = {float(after[f"{name}.input_scale"]) for name in (Q, K, V)}
    assert len(scales) == 1 and scales.pop() == pytest.approx(1.5 * float(before[f"{Q}.input_scale"]), rel=1e-2)
    for name in (Q, K, V):  # the same linear: y = deq (xq W + quant_bias)
        real, made = (each[f"{name}.deq_scale"].to(torch.int32).view(torch.float32) for each in (before, after))
        ratio = float(after[f"{name}.input_scale"]) / float(before[f"{name}.input_scale"])
        if name != K:
            torch.testing.assert_close(made, real * ratio, rtol=2e-3, atol=0)
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    require_harmless(out, loader)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_shared_range_is_one_that_is_stored(tmp_path, dtype):
    """deq_scale and quant_bias are of the input_scale in the file, which has fewer bits than the range."""
    toy = Toy(tmp_path, dtype=dtype, architecture="Qwen2ForCausalLM")
    before = toy.load()
    offset = before[f"{K}.input_offset"] + 20
    toy.change({f"{K}.input_scale": before[f"{K}.input_scale"] * 1.01, f"{K}.input_offset": offset})
    after = stored(convert(toy, "mindie", lossy=True)[0])
    for name in (Q, V):
        deq = after[f"{name}.deq_scale"]
        deq = deq if dtype == "bfloat16" else deq.to(torch.int32).view(torch.float32)
        expected = after[f"{name}.input_scale"].float() * before[f"{name}.weight_scale"][:, 0]
        torch.testing.assert_close(deq, expected, rtol=1e-6, atol=0)
        sums = before[f"{name}.weight"].long().sum(1) * after[f"{name}.input_offset"].float()
        bias = (after[f"{name}.quant_bias"] + sums) * deq
        assert ((bias - before[f"{name}.bias"].float()).abs() <= 0.51 * deq).all()


def shift(toy: Toy, *linears: str) -> None:
    """Put a bias into quant_bias alone, as a shift of the inputs does."""
    toy.change({f"{name}.quant_bias": toy.load()[f"{name}.quant_bias"] + 5000 for name in linears})


def test_a_bias_inside_quant_bias_is_not_lost(tmp_path):
    toy = Toy(tmp_path).keep_float(Q)
    shift(toy, K, V)
    with pytest.raises(EightfoldError, match=r"k_proj as FLOAT .* got a bias inside its quant_bias"):
        convert(toy, "vllm-ascend", lossy=True)
    toy = Toy(tmp_path / "biased", architecture="Qwen2ForCausalLM")
    float_bias = {f"{Q}.bias": toy.load()[f"{Q}.bias"]}
    toy.keep_float(Q).change(float_bias, "FLOAT")
    shift(toy, K)
    before = toy.load()
    after = stored(convert(toy, "vllm-ascend", lossy=True)[0])
    deq = before[f"{K}.deq_scale"].to(torch.int32).view(torch.float32)
    torch.testing.assert_close(after[f"{K}.bias"].float(), before[f"{K}.bias"].float() + 5000 * deq, rtol=1e-2, atol=0)
    assert torch.equal(after[f"{V}.bias"], before[f"{V}.bias"])


def quantize_head(toy: Toy) -> None:
    """Store the head as --quantize-lm-head does."""
    weight = toy.load()["lm_head.weight"].float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors = {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale, "weight_offset": scale * 0}
    toy.change({f"lm_head.{name}": tensor for name, tensor in tensors.items()}, "W8A16")


@pytest.mark.parametrize("loader", LOADERS)
def test_an_int8_head(tmp_path, loader):
    """It is widened, which is one loss; of a tied model nobody reads it, which is none."""
    toy = Toy(tmp_path, "w8a16")
    quantize_head(toy)
    out, _, losses = convert(toy, loader, lossy=True)
    assert len(losses) == 1 and "lm_head" in losses[0]
    require_harmless(out, loader)
    toy = Toy(tmp_path / "tied", "w8a16").configure(tie_word_embeddings=True)
    quantize_head(toy)
    out, _, losses = convert(toy, loader)
    assert losses == [] and not any(name.startswith("lm_head") for name in stored(out))
    require_harmless(out, loader)


def test_half_of_a_cache_is_a_loss(tmp_path):
    toy = Toy(tmp_path).add_kv_cache().remove(f"{K}.kv_cache_scale")
    out, _, losses = convert(toy, "vllm-ascend", lossy=True)
    assert len(losses) == 1 and "is missing" in losses[0]
    assert {name.rpartition(".self_attn")[0] for name in stored(out) if "kv_cache" in name} == {LAYERS[1]}


def real_weight(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return (N, K) float32."""
    weight = tensors[f"{name}.weight"].float()
    if f"{name}.weight_scale" not in tensors:
        return weight
    return (weight - tensors[f"{name}.weight_offset"].float()) * tensors[f"{name}.weight_scale"].float()


def test_a_mixture_has_one_type_for_mindie(tmp_path):
    toy = Toy(tmp_path, modules=(("*.down_proj", "w8a16"),))
    before = toy.load()
    with pytest.raises(EightfoldError, match=r"8-bit linears become F16.*Give `lossy`"):
        plan_export(toy.path, "mindie", ExportOptions(), lossy=False)
    out, _, losses = convert(toy, "mindie", lossy=True)
    after = stored(out)
    assert f"{DOWN}.weight_scale" not in after and after[f"{DOWN}.weight"].dtype == torch.float16
    torch.testing.assert_close(real_weight(after, DOWN), real_weight(before, DOWN), rtol=1e-3, atol=1e-7)
    require_harmless(out, "mindie")
    assert "down_proj" in losses[0]


def test_offsets_that_vllm_ascend_turns_are_rounded_away(tmp_path):
    toy = Toy(tmp_path, "w8a16", asymmetric=True)
    before = toy.load()
    out, _, losses = convert(toy, "vllm-ascend", lossy=True)
    after = stored(out)
    assert not after[f"{O}.weight_offset"].any() and "without offsets" in losses[0]
    error = (real_weight(after, O) - real_weight(before, O)).abs()
    assert (error <= after[f"{O}.weight_scale"] * 0.51).all() and error.any()
    require_harmless(out, "vllm-ascend")


def test_part_of_a_group_float(tmp_path):
    toy = Toy(tmp_path).keep_float(Q)
    kept, _, losses = convert(toy, "mindie")
    assert losses == [] and stored(kept)[f"{K}.weight"].dtype == torch.int8
    widened, _, losses = convert(Toy(tmp_path / "b").keep_float(Q), "vllm-ascend", lossy=True)
    assert losses and all(stored(widened)[f"{name}.weight"].dtype == torch.float16 for name in (Q, K, V))
    require_harmless(widened, "vllm-ascend")


def test_attention_that_a_loader_does_not_have_is_left_out(tmp_path):
    out, _, losses = convert(Toy(tmp_path).add_attention(), "vllm-ascend", lossy=True)
    assert "FAQuant" in losses[0] and not any(".fa_" in name for name in stored(out))
    out, _, losses = convert(Toy(tmp_path / "b").add_attention(), "mindie")
    assert losses == [] and any(".fa_" in name for name in stored(out))
    out, _, losses = convert(Toy(tmp_path / "c").add_kv_cache(offset=-3.0), "mindie", lossy=True)
    assert "misreads its offsets" in losses[0] and not any("kv_cache" in name for name in stored(out))


def test_attention_by_channel_becomes_one_by_head(tmp_path):
    out, notes, losses = convert(Toy(tmp_path).add_attention(columns=12), "mindie")
    assert losses == [] and any("for each head" in note for note in notes)
    assert stored(out)[f"{LAYERS[0]}.self_attn.fa_q.scale"].shape == (4, 1)
    require_harmless(out, "mindie")


def test_files_that_are_missing_come_from_elsewhere(tmp_path):
    toy, whole = Toy(tmp_path), Toy(tmp_path / "whole")
    remove_tokenizer(toy)
    with pytest.raises(EightfoldError, match="there is none"):
        convert(toy, "mindie")
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()
    out, _, _ = convert(toy, "mindie", files_from=whole.path)
    assert (out / "tokenizer.json").read_bytes() == (whole.path / "tokenizer.json").read_bytes()
    with pytest.raises(EightfoldError, match=r"files_from: got .*nowhere, expected a directory"):
        convert(toy, "mindie", files_from=tmp_path / "nowhere")
    with pytest.raises(EightfoldError, match=r"files_from: got .* expected to: mindie or vllm-ascend"):
        plan_export(toy.path, "compressed-tensors", ExportOptions(files_from=whole.path), lossy=False)


def keep_all_float(toy: Toy) -> None:
    toy.keep_float(*[name.removesuffix(".weight") for name in toy.load() if name.endswith("proj.weight")])


NAN, EMBED = float("nan"), "model.embed_tokens.weight"
TWO = all_of(rename_description("quant_model_description_w8a8.json"), write("quant_model_description_x.json", "{}"))

REFUSED = [
    case("a float model", keep_all_float),
    case("an unknown type", lambda t: t.describe({f"{DOWN}.weight": "W4A8_DYNAMIC"})),
    case("no input_scale", lambda t: t.remove(f"{O}.input_scale")),
    case("a missing weight", lambda t: t.remove(f"{O}.weight")),
    case("another size", lambda t: t.configure(intermediate_size=96)),
    case("an int8 head without a scale", store_as(torch.int8, "lm_head.weight")),
    case("two descriptions", TWO),
    case("an offset beyond int8", fill(200.0, (1,), f"{O}.input_offset")),
    case("an empty scale", fill(0.0, (0,), f"{Q}.input_scale")),
    case("a scale of some rows", fill(0.1, (3, 1), f"{Q}.weight_scale")),
    case("a scale in float64", store_as(torch.float64, f"{Q}.weight_scale")),
    case("an offset in int16", store_as(torch.int16, f"{Q}.input_offset")),
    case("a weight in float64", all_of(lambda t: t.keep_float(O), store_as(torch.float64, f"{O}.weight"))),
    case("NaN in a norm", times(NAN, "model.norm.weight")),
    case("NaN in an embedding of bfloat16", all_of(store_as(torch.bfloat16, EMBED), times(NAN, EMBED))),
    case("NaN in a scale", times(NAN, f"{O}.weight_scale")),
    case("NaN in an offset", times(NAN, f"{Q}.input_offset", f"{K}.input_offset", f"{V}.input_offset")),
    case("a scale of 0", times(0.0, f"{Q}.input_scale")),
    case("a scale below 0", times(-1.0, f"{O}.input_scale")),
    case("a scale that float16 does not hold", fill(1e6, (1,), f"{O}.input_scale")),
    case("NaN in a cache", all_of(lambda t: t.add_kv_cache(), times(NAN, f"{K}.kv_cache_scale"))),
    case("a cache in float64", all_of(lambda t: t.add_kv_cache(), store_as(torch.float64, f"{K}.kv_cache_scale"))),
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_repaired_is_said_and_nothing_is_left(tmp_path, loader, case: Case):
    toy = Toy(tmp_path)
    case.change(toy)
    with pytest.raises(EightfoldError) as caught:
        convert(toy, loader, lossy=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


def test_another_export_at_the_same_place_is_told_what_differs(tmp_path):
    toy, whole = Toy(tmp_path), Toy(tmp_path / "whole")
    out, _, _ = convert(toy, "mindie", files_from=whole.path)

    def refusal(to: str, **options: Any) -> str:
        with pytest.raises(EightfoldError) as caught:
            plan_export(toy.path, to, ExportOptions(**options), lossy=True).write(out, overwrite=False, progress=silent)
        return str(caught.value)

    assert f"(`files_from`: {whole.path} -> none)" in refusal("mindie")
    assert "(`to`: mindie -> compressed-tensors)" in refusal("compressed-tensors")


def test_a_file_that_ends_too_early_is_named_and_not_what_it_lacks(tmp_path):
    toy = Toy(tmp_path)
    content = toy.weights.read_bytes()
    toy.weights.unlink()
    toy.weights.write_bytes(content[:-100])
    with pytest.raises(EightfoldError, match=rf"^{toy.weights.name} is truncated"):
        convert(toy, "mindie", lossy=True)


def test_per_row_without_a_word_of_the_description(tmp_path):
    toy = Toy(tmp_path, "w8a16")
    toy.description.unlink()
    with pytest.raises(EightfoldError, match=r"Write .*model_quant_type"):
        convert(toy, "mindie")
    toy.description.write_text('{"model_quant_type": "W8A16"}')
    out, _, losses = convert(toy, "mindie")
    assert losses == []
    assert_same(stored(out), Toy(tmp_path / "b", "w8a16").load())


CASES = [*CONFIG_CASES, *LABEL_CASES, *MIXED_CASES, *TENSOR_CASES, *ATTENTION_CASES]


@pytest.mark.parametrize("loader", LOADERS)
def test_every_fault_that_check_knows_is_repaired_or_refused(tmp_path, loader):
    """One test for all of them: each takes some hundredths of a second."""
    repaired = 0
    for at, each in enumerate(CASES):
        toy = Toy(tmp_path / str(at), **each.options)
        each.change(toy)
        try:
            out, _, _ = convert(toy, loader, lossy=True)
        except EightfoldError as error:
            assert "\n" not in str(error), each.title
            assert not (toy.path.parent / "out").exists(), each.title
        else:
            require_harmless(out, loader)
            repaired += 1
    assert repaired >= 90, repaired


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    toy = Toy(tmp_path)
    whole, _, _ = convert(toy, "mindie")
    plan, target = plan_export(toy.path, "mindie", ExportOptions(), lossy=False), tmp_path / "again"
    real, steps = streaming._write_item, []

    def write_item(files: Any, item: streaming.Item) -> None:
        if item.step == "layer 1" and "layer 1" not in steps:
            steps.append("layer 1")
            raise KeyboardInterrupt
        steps.append(item.step)
        real(files, item)

    monkeypatch.setattr(streaming, "_write_item", write_item)
    with pytest.raises(KeyboardInterrupt):
        plan.write(target, overwrite=False, progress=silent)
    steps[:] = ["layer 1"]
    plan.write(target, overwrite=False, progress=silent)
    assert "layer 0" not in steps and len(steps) > 2
    for path in whole.iterdir():
        if "journal" not in path.name:
            assert (target / path.name).read_bytes() == path.read_bytes(), path.name
