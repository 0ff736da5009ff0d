"""Every option of a recipe on every family: what is on disk, and that it still computes the model."""

from __future__ import annotations

import json

import pytest
import torch

from eightfold.errors import ConfigError, UnsupportedError
from eightfold.families import all_norms, input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch, LinearGroup
from eightfold.model.reference.linear import asymmetric
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.quant.run import compare_logits
from eightfold.scheme import KV_SCALE, QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(4)
LAYERS = [f"model.layers.{i}" for i in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_model(folder / name, tiny_config(name), tokenizer=False) for name in FAMILIES}
    made["tied"] = write_model(folder / "tied", tiny_config(tie_word_embeddings=True), tokenizer=False)
    return made


@pytest.fixture
def quantized(models, tmp_path):
    def make(model="LlamaForCausalLM", scheme=QuantType.W8A8, name="out", legacy_names=False, **recipe):
        quantize_checkpoint(
            models[model], tmp_path / name, Recipe(scheme, **recipe), SAMPLES, legacy_names=legacy_names
        )
        return Checkpoint.open(tmp_path / name)

    return make


def report(checkpoint):
    return json.loads((checkpoint.directory / "eightfold_report.json").read_text())


def logits(checkpoint, **options):
    return Decoder(checkpoint, **options).logits(SAMPLES[0])


def contents(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.directory.iterdir()}


def error(found, want):
    """Deviation of logits from others, as a share of their own."""
    return float((found - want).std() / want.std())


# Every method where there are biases, and m4, which smooths all that can be smoothed, on every family.
SMOOTHED = [("Qwen2ForCausalLM", method) for method in AntiOutlier] + [
    (family, AntiOutlier.M4) for family in FAMILIES if family != "Qwen2ForCausalLM"
]


@pytest.mark.parametrize(("family", "method"), SMOOTHED)
def test_smoothing_changes_nothing_but_ranges(models, quantized, family, method):
    out = quantized(family, anti_outlier=method, save_float32=True)
    said = report(out)["anti_outlier"]
    assert 0 <= said["max_logit_difference"] <= 1e-3 * said["max_logit"]
    groups = {"qkv", "gate_up"} | ({"o", "down"} if method.smooths_linear_pairs else set())
    assert said["choices"].keys() == {f"{layer}.{group}" for layer in LAYERS for group in groups}
    for norm in all_norms(out.config):
        bias = f"{norm}.bias"
        assert (bias in out.tensors) == method.adds_norm_bias
        assert not method.adds_norm_bias or not load_tensor(out, bias).any()
    # int8 has an error of about 1/100 of a deviation; two layers keep it below 1/5.
    assert error(logits(out), logits(Checkpoint.open(models[family]))) < 0.2


@pytest.mark.parametrize("method", [AntiOutlier.M4, AntiOutlier.M6])
def test_legacy_names_repeat_smoothed_norms(quantized, method):
    plain = quantized(anti_outlier=method, name="plain")
    legacy = quantized(anti_outlier=method, name="legacy", legacy_names=True)
    for norm in all_norms(plain.config):
        repeated = {f"{norm}.module.weight", f"{norm}.module.bias"}
        if not method.adds_norm_bias:
            assert not repeated & legacy.tensors.keys()
            continue
        assert repeated <= legacy.tensors.keys()
        assert f"{norm}.bias" not in legacy.tensors
        gain = load_tensor(legacy, f"{norm}.weight")
        assert torch.equal(load_tensor(legacy, f"{norm}.module.weight"), gain)
        assert torch.equal(gain, load_tensor(plain, f"{norm}.weight"))
    assert torch.equal(logits(plain), logits(legacy))


def test_smooth_leaves_inputs_alone_that_stay_float(quantized):
    kinds = (("*.down_proj", QuantType.FLOAT), ("*.o_proj", QuantType.W8A16), ("*.0.self_attn.k_proj", QuantType.FLOAT))
    out = quantized(anti_outlier=AntiOutlier.SMOOTH, act_method=ActMethod.EXTREMES, modules=kinds)
    choices = report(out)["anti_outlier"]["choices"]
    of_group = dict.fromkeys(("qkv", "o", "gate_up"), "least error")
    assert choices == {f"{layer}.{group}": choice for layer in LAYERS for group, choice in of_group.items()}


def test_iter_takes_the_linears_before_as_those_behind_leave_them(models, quantized):
    source = Checkpoint.open(models["LlamaForCausalLM"])
    scales, norm = {}, "post_attention_layernorm"
    for method in (AntiOutlier.M4, AntiOutlier.ITER):
        out = quantized(anti_outlier=method, keep_float=("*",), save_float32=True, name=method.value)
        for layer in LAYERS:
            gains = [load_tensor(each, f"{layer}.{norm}.weight").float() for each in (source, out)]
            scale = gains[0] / gains[1]
            # What m4 saw of gate and up is in the source; what iter saw, in its output.
            seen = source if method is AntiOutlier.M4 else out
            linears = [load_tensor(seen, f"{layer}.mlp.{name}.weight").float() for name in ("gate_proj", "up_proj")]
            largest = torch.cat(linears).abs().amax(0) / (1 if seen is source else scale)
            scales[method, layer] = scale, scale * largest**0.1
    for layer in LAYERS:
        m4, found = (scales[method, layer] for method in (AntiOutlier.M4, AntiOutlier.ITER))
        assert (m4[0] != found[0]).any()
        torch.testing.assert_close(m4[1], found[1], rtol=1e-4, atol=0)


def inputs_seen(checkpoint):
    """Return the input of each group of linears in the float model, (T, K) of all samples."""
    decoder, states, found = Decoder(checkpoint), [], {}
    with torch.inference_mode():
        states = [decoder.embed(sample) for sample in SAMPLES]
        for layer_idx, layer in enumerate(LAYERS):
            groups = []
            for group in input_groups(checkpoint.config, layer_idx):
                linears = LinearGroup(tuple(decoder.linear(f"{layer}.", linear) for linear in group.linears))
                seen = found[layer, group.title] = []
                groups.append(lambda x, batch, linears=linears, seen=seen: (seen.append(x), linears(x, batch))[1])
            block = decoder.block(layer_idx, groups)
            states = [block(x, Batch.of([len(x)], decoder.turns())) for x in states]
    return {name: torch.cat(seen) for name, seen in found.items()}


# A norm's linears, and what its stored gain says its output was divided by. Nothing is said of o and down.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, AntiOutlier.M4, AntiOutlier.SMOOTH])
def test_extremes_are_those_of_the_smoothed_float_model(models, quantized, family, method):
    source = Checkpoint.open(models[family])
    out = quantized(family, anti_outlier=method, act_method=ActMethod.EXTREMES, quantize_lm_head=True)
    linears = {"qkv": ("input_layernorm", "self_attn.q_proj"), "gate_up": ("post_attention_layernorm", "mlp.up_proj")}
    if method is None:
        linears |= {"o": ("", "self_attn.o_proj"), "down": ("", "mlp.down_proj")}
    for (layer, title), x in inputs_seen(source).items():
        if title not in linears:
            continue
        norm, linear = linears[title]
        gains = [load_tensor(each, f"{layer}.{norm}.weight").float() for each in (source, out)] if norm else [1, 1]
        scaled = x * gains[1] / gains[0]
        scale, offset = asymmetric(scaled.min()[None], scaled.max()[None])
        found = [load_tensor(out, f"{layer}.{linear}.input_{part}").float() for part in ("scale", "offset")]
        # It is stored in bfloat16; and smooth looks at inputs that int8 linears have made.
        near, steps = (0.05, 6) if method is AntiOutlier.SMOOTH else (0.01, 1)
        torch.testing.assert_close(found[0], scale, rtol=near, atol=0)
        assert abs(float(found[1] - offset)) <= steps
    assert error(logits(out), logits(source)) < 0.2


ATTENTIONS = [
    {"fa_quant": True},
    {"kv_int8": True},
    {"kv_int8": True, "kv_symmetric": False},
    {"kv_int8": True, "kv_observe": KVObserve.PRE_ROPE},
]


@pytest.mark.parametrize(
    ("family", "choice"),
    [(family, choice) for family in FAMILIES for choice in ATTENTIONS[: 4 if family == "Qwen3ForCausalLM" else 2]],
)
def test_int8_attention_is_stored_and_near_float(models, quantized, family, choice):
    out = quantized(family, keep_float=("*_proj",), **choice)
    tags = out.description.tags
    if "fa_quant" in choice:
        sizes = {"q": 4, "k": 2, "v": 2}
        names = {f"self_attn.fa_{part}.{kind}": (n, 1) for part, n in sizes.items() for kind in ("scale", "offset")}
    else:
        names = {f"self_attn.{p}_proj.kv_cache_{kind}": (32,) for p in "kv" for kind in ("scale", "offset")}  # type: ignore[misc]
    for name, shape in ((f"{layer}.{name}", shape) for layer in LAYERS for name, shape in names.items()):
        assert tags[name] == ("FAQuant" if "fa_quant" in choice else "C8")
        assert out.tensors[name].shape == shape
        assert not name.endswith("offset") or "kv_symmetric" in choice or not load_tensor(out, name).any()
    assert ("kv_cache" in report(out)) == ("kv_observe" in choice)
    want = logits(Checkpoint.open(models[family]))
    found = logits(out)
    # Only attention is int8: an error of about 1/100 of a deviation in each part, and keys that RoPE carried beyond
    # a range taken before it are cut.
    assert 0 < error(found, want) < (0.1 if "kv_observe" in choice else 0.05)
    # A prompt alone reads nothing back in this mode.
    torch.testing.assert_close(logits(out, attention="mindie"), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_everything_at_once_runs(models, quantized, family):
    want = logits(Checkpoint.open(models[family]))
    for i, choice in enumerate(ATTENTIONS[:2]):
        out = quantized(family, name=f"out{i}", anti_outlier=AntiOutlier.M4, act_method=ActMethod.AUTO, **choice)  # type: ignore[arg-type]
        found = logits(out)
        assert torch.isfinite(found).all()
        assert error(found, want) < 0.25


def test_mix_stores_the_tensors_of_w8a8(quantized):
    static, mix = (
        quantized("Qwen2ForCausalLM", kind, name=kind.value) for kind in (QuantType.W8A8, QuantType.W8A8_MIX)
    )
    assert static.tensors.keys() == mix.tensors.keys()
    for name in static.tensors:
        assert torch.equal(load_tensor(static, name), load_tensor(mix, name))
        old, new = static.description.tags[name], mix.description.tags[name]
        assert new == ("W8A8_MIX" if old == "W8A8" else old)
    dynamic = quantized("Qwen2ForCausalLM", QuantType.W8A8_DYNAMIC, name="dynamic")
    assert torch.equal(logits(mix), logits(dynamic))
    head = Decoder(mix).head()
    generated = Decoder(mix).hidden_states([SAMPLES[0]], origin="generated")
    assert torch.equal(head(generated, "generated"), logits(static))


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("LlamaForCausalLM", QuantType.W8A8),
        *(("tied", kind) for kind in (QuantType.W8A8_MIX, QuantType.W8A8_DYNAMIC, QuantType.W8A16)),
    ],
)
def test_quantized_head(quantized, model, scheme):
    plain = quantized(model, scheme, name="plain")
    out = quantized(model, scheme, quantize_lm_head=True)
    assert plain.config_raw["tie_word_embeddings"] == (model == "tied")
    assert out.config_raw["tie_word_embeddings"] is False
    assert out.quant_type("lm_head") is scheme
    assert out.tensors["model.embed_tokens.weight"].dtype == "BF16"
    # The head is all that differs: 1/100 of a deviation for weights, as much for inputs.
    assert 0 < error(logits(out), logits(plain)) < 0.05


def kept_float(checkpoint):
    proj = (name for name in checkpoint.description.tags if name.endswith("_proj.weight"))
    return {name.removesuffix(".weight") for name in proj if checkpoint.description.tags[name] == "FLOAT"}


@pytest.mark.parametrize("method", [None, AntiOutlier.M4])
def test_levels_roll_back_and_say_so(quantized, method):
    exact = quantized(name="exact", disable_level=3, exact_levels=True, anti_outlier=method)
    rows = report(exact)["rolled_back"]
    assert len(rows) == 3
    assert {row["linear"] for row in rows} == kept_float(exact)
    widths = [row["range_over_std"] for row in rows]
    assert widths == sorted(widths, reverse=True)
    whole = quantized(disable_level=3, anti_outlier=method)
    rows = report(whole)["rolled_back"]
    assert {row["linear"] for row in rows} == kept_float(whole) >= kept_float(exact)
    assert {row["linear"] for row in rows if not row["only_with_its_group"]} == kept_float(exact)
    assert set(report(whole)["linears"]["float"]) == kept_float(whole)
    assert torch.isfinite(logits(whole)).all()


@pytest.mark.parametrize(
    ("level", "options"), [(15, {}), (16, {"quantize_lm_head": True}), (13, {"keep_float": ("*.down_proj",)})]
)
def test_level_beyond_all_linears_is_refused(quantized, tmp_path, level, options):
    with pytest.raises(ConfigError, match=f"got L{level}, expected at most L{level - 1}"):
        quantized(disable_level=level, **options)
    assert not list(tmp_path.iterdir())
    out = quantized(disable_level=level - 1, **options)
    assert all(tag == "FLOAT" for tag in out.description.tags.values())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fa_amp_leaves_attention_float(quantized, count):
    out = quantized(fa_quant=True, fa_amp=count)
    said = report(out)["attention"]
    scores = said["stretch_scores"]
    assert scores.keys() == {"0", "1"}
    assert len(said["float_layers"]) == min(count, 2)
    if count == 1:
        assert scores[str(said["float_layers"][0])] == min(scores.values())
    for i, layer in enumerate(LAYERS):
        kind = QuantType.FLOAT if i in said["float_layers"] else QuantType.FAQUANT
        assert out.attention_type(i) is kind
        assert (f"{layer}.self_attn.fa_q.scale" in out.tensors) == (kind is QuantType.FAQUANT)
    assert torch.isfinite(logits(out)).all()


@pytest.mark.parametrize(
    "recipe",
    [
        {"anti_outlier": AntiOutlier.M6, "act_method": ActMethod.AUTO, "disable_level": 2, "quantize_lm_head": True},
        {"anti_outlier": AntiOutlier.M4, "act_method": ActMethod.HISTOGRAM, "fa_quant": True, "fa_amp": 1},
        {"anti_outlier": AntiOutlier.M2, "kv_int8": True, "kv_symmetric": False, "kv_observe": KVObserve.PRE_ROPE},
    ],
)
def test_two_runs_give_the_same_bytes(quantized, recipe):
    first, second = (contents(quantized("Qwen3ForCausalLM", name=name, **recipe)) for name in ("a", "b"))
    assert first == second


def test_cache_range_of_values_follows_smoothing(quantized):
    common = {"model": "Qwen2ForCausalLM", "keep_float": ("*_proj",), "save_float32": True, "kv_int8": True}
    plain, smooth = quantized(name="plain", **common), quantized(anti_outlier=AntiOutlier.M4, **common)
    for layer in LAYERS:
        value, key = f"{layer}.self_attn.v_proj", f"{layer}.self_attn.k_proj"
        ratio = load_tensor(plain, f"{value}.bias") / load_tensor(smooth, f"{value}.bias")
        scales = [load_tensor(out, f"{value}.kv_cache_scale") for out in (plain, smooth)]
        # One division more in float32 on either side.
        torch.testing.assert_close(scales[0] / scales[1], ratio, rtol=1e-6, atol=0)
        assert ratio.std() > 0.01
        assert torch.equal(*(load_tensor(out, f"{key}.kv_cache_scale") for out in (plain, smooth)))


def test_a_smoothed_model_that_computes_no_numbers_is_refused(float_model):
    decoder = Decoder(Checkpoint.open(float_model))
    states = torch.randn(3, decoder.checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert compare_logits(decoder, states, states)[0] == 0
    with pytest.raises(UnsupportedError, match="got nan"):
        compare_logits(decoder, states, torch.full_like(states, torch.nan))


# With m2 and range parameters, the first sample, the spread and the features count too; without, one stream does all.
ANTI = [
    {"anti_outlier": AntiOutlier.M4},
    {"anti_outlier": AntiOutlier.M2, "act_method": ActMethod.AUTO, "kv_int8": True},
    {"anti_outlier": AntiOutlier.M6, "fa_quant": True, "fa_amp": 1, "disable_level": 1},
]


@pytest.mark.parametrize("choices", ANTI)
def test_samples_of_their_own_for_outlier_suppression(models, quantized, tmp_path, choices):
    def made(name, samples, anti):
        recipe = Recipe(QuantType.W8A8, **choices)
        quantize_checkpoint(models["Qwen2ForCausalLM"], tmp_path / name, recipe, samples, anti)
        return Checkpoint.open(tmp_path / name)

    def differing(a, b):
        names = a.tensors.keys() & b.tensors.keys()
        return {name for name in names if not torch.equal(load_tensor(a, name), load_tensor(b, name))}

    others = token_samples(6, seed=4)
    plain, same = made("plain", SAMPLES, None), made("same", SAMPLES, SAMPLES)
    assert plain.tensors.keys() == same.tensors.keys()
    assert not differing(plain, same)
    assert "anti_calibration" not in report(plain)
    assert report(same)["anti_calibration"] == report(same)["calibration"] == report(plain)["calibration"]
    apart = made("apart", SAMPLES, others)
    assert report(apart)["calibration"] == report(plain)["calibration"]
    assert report(apart)["anti_calibration"]["samples"] == 6
    other = made("other", others, None)
    # Scales are those of the samples for suppression: so are gains. What keys reach is that of the calibration.
    norms = {f"{norm}.weight" for norm in all_norms(plain.config)}
    assert not differing(apart, other) & norms
    assert differing(apart, plain) & norms
    keys = {name for name in plain.tensors if name.endswith(f"k_proj.{KV_SCALE}")}
    assert bool(keys) == choices.get("kv_int8", False)
    assert not differing(apart, plain) & keys
    assert not keys or differing(apart, other) & keys


def test_samples_for_suppression_are_enough_where_nothing_else_is_calibrated(models, tmp_path):
    source, recipe = models["LlamaForCausalLM"], Recipe(QuantType.W8A16, anti_outlier=AntiOutlier.M3)
    quantize_checkpoint(source, tmp_path / "a", recipe, None, SAMPLES)
    quantize_checkpoint(source, tmp_path / "b", recipe, SAMPLES)
    a, b = (Checkpoint.open(tmp_path / name) for name in "ab")
    assert all(torch.equal(load_tensor(a, name), load_tensor(b, name)) for name in b.tensors)
    assert "calibration" not in report(a)
    with pytest.raises(ConfigError, match="calibration samples for W8A8: got none"):
        quantize_checkpoint(source, tmp_path / "c", Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M3), None, SAMPLES)
