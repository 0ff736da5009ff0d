"""config.json: two dialects in, both out, and nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold.architectures import KNOWN
from eightfold.config import DType, ModelConfig, has_engine, parse_config
from eightfold.errors import CheckpointError, ConfigError, EightfoldError, UnsupportedError
from eightfold.files import read_json
from eightfold.rope import RopeParameters
from eightfold.written_config import both_dialects
from tests.conftest import FAMILIES, SPARSE, tiny_config

WHERE = Path("m/config.json")

PARTIAL = "partial_rotary_factor"

SUPPORTED = KNOWN
ACTIVATIONS = "silu, swish or gelu_pytorch_tanh"

LLAMA3: dict[str, Any] = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16.0,
    "truncate": False,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}

# The same rotary embedding as transformers 4 and 5 write it.
ROPE_DIALECTS: list[tuple[dict[str, Any], dict[str, Any], RopeParameters]] = [
    (
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        RopeParameters(rope_theta=5e5),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        RopeParameters(rope_theta=5e5, **LLAMA3),
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
        RopeParameters(rope_theta=1e4, rope_type="linear", factor=4.0),
    ),
    (
        {"rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 1e6, **YARN}},
        RopeParameters(rope_theta=1e6, **YARN),
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}},
        RopeParameters(rope_type="dynamic", factor=4.0, original_max_position_embeddings=128),  # the context
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": LONGROPE},
        {"rope_parameters": {"rope_theta": 1e4, **LONGROPE}},
        RopeParameters(
            rope_type="longrope",
            factor=4.0,  # max_position_embeddings / the original ones
            original_max_position_embeddings=32,
            short_factor=tuple(LONGROPE["short_factor"]),
            long_factor=tuple(LONGROPE["long_factor"]),
        ),
    ),
]
ROPE_IDS = ["default", "llama3", "linear", "yarn", "dynamic", "longrope"]
ROPE_TYPES = "default, linear, dynamic, yarn, longrope or llama3"


def config(**changes: Any) -> dict[str, Any]:
    """Return a config.json object; a key given as ... is left out."""
    return {key: value for key, value in tiny_config(**changes).items() if value is not ...}


def with_rope(rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config(rope_theta=..., rope_scaling=...), **rope, **changes}


def parse(raw: dict[str, Any]) -> ModelConfig:
    return parse_config(raw, WHERE)


def refusal(raw: dict[str, Any], kind: type[EightfoldError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        parse(raw)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is read


def test_every_field_is_read():
    raw = config(attention_bias=True, mlp_bias=True, sliding_window=7, use_sliding_window=True, max_window_layers=1)
    assert parse({**raw, "layer_types": ["full_attention", "sliding_attention"], "unknown": {"any": "thing"}}) == (
        ModelConfig(
            architecture="LlamaForCausalLM",
            dtype=DType.BF16,
            vocab_size=320,
            hidden_size=48,
            intermediate_size=80,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="silu",
            rope=RopeParameters(rope_theta=10000.0),
            sliding_window=7,
            use_sliding_window=True,
            max_window_layers=1,
            layer_types=("full_attention", "sliding_attention"),
        )
    )


def test_sizes_follow_from_heads():
    parsed = parse(config())
    assert (parsed.q_size, parsed.kv_size) == (64, 32)


@pytest.mark.parametrize("absent", [..., None])
def test_absent_and_null_fields_have_the_usual_defaults(absent):
    optional = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "head_dim")
    parsed = parse(config(**dict.fromkeys((*optional, "num_key_value_heads", "torch_dtype", "rope_theta"), absent)))
    assert parsed.head_dim == 48 // 4
    assert parsed.num_kv_heads == parsed.num_heads == 4
    assert parsed.dtype is None
    assert parsed.rms_norm_eps == 1e-6
    assert parsed.max_position_embeddings == 2048
    assert parsed.tie_word_embeddings is False
    assert parsed.hidden_act == "silu"
    assert parsed.rope == RopeParameters(rope_theta=10000.0, rope_type="default")


def test_a_sliding_window_of_null_is_none_and_an_absent_one_has_the_default():
    assert parse(config(sliding_window=None)).sliding_window is None
    assert parse(config(sliding_window=...)).sliding_window == 4096


def test_values_at_the_limits_are_taken():
    parsed = parse(config(num_hidden_layers=10_000, max_window_layers=-1, rms_norm_eps=1))
    assert (parsed.num_layers, parsed.max_window_layers) == (10_000, -1)
    assert isinstance(parsed.rms_norm_eps, float)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "torch."])
def test_dtype_is_read_from_either_dialect(key, name, prefix):
    raw = {**config(torch_dtype=...), key: prefix + name}
    assert parse(raw).dtype is {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}[name]


def test_dtype_may_be_said_twice():
    assert parse(config(torch_dtype="float16", dtype="torch.float16")).dtype is DType.F16


@pytest.mark.parametrize(("old", "new", "expected"), ROPE_DIALECTS, ids=ROPE_IDS)
def test_rope_is_read_from_either_dialect_and_from_both(old, new, expected):
    assert parse(with_rope(old)).rope == expected
    assert parse(with_rope(new)).rope == expected
    assert parse(with_rope({**old, **new})).rope == expected


def test_the_base_may_stand_inside_rope_scaling():
    assert parse(with_rope({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}})).rope == (
        RopeParameters(rope_theta=7.0, rope_type="linear", factor=2.0)
    )


def test_a_base_without_scaling_may_stand_beside_rope_parameters():
    assert parse(with_rope({"rope_theta": 7, "rope_parameters": {"rope_type": "linear", "factor": 2}})).rope == (
        RopeParameters(rope_theta=7.0, rope_type="linear", factor=2.0)
    )


# --- contradictions


def test_two_dtypes_are_refused():
    assert refusal(config(dtype="float16")) == (
        '"torch_dtype" and "dtype" in m/config.json: got bfloat16 and float16, expected the same type. Remove one.'
    )


def test_two_rope_bases_are_refused():
    assert refusal(with_rope({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}})) == (
        '"rope_theta" and "rope_parameters.rope_theta" in m/config.json: got 10000 and 500000, expected the same base. '
        "Remove the wrong one."
    )


def test_two_rope_scalings_are_refused():
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}
    assert refusal(with_rope({"rope_scaling": old, "rope_parameters": new})) == (
        "\"rope_scaling\" and \"rope_parameters\" in m/config.json: got {'factor': 2.0, 'rope_type': 'linear'} and "
        "{'rope_type': 'linear', 'factor': 4.0}, expected the same scaling. Remove the wrong one."
    )


def test_a_scaling_beside_its_denial_is_refused():
    raw = with_rope({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert refusal(raw).startswith('"rope_scaling" and "rope_parameters" in m/config.json: got ')


# --- values that make no sense


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
@pytest.mark.parametrize("absent", [..., None])
def test_a_missing_size_is_named(key, absent):
    assert refusal(config(**{key: absent})) == f'"{key}" in m/config.json: got nothing, expected a value'


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", "320", "got '320', expected a valid integer"),
        ("vocab_size", 0, "got 0, expected greater than 0"),
        ("hidden_size", -48, "got -48, expected greater than 0"),
        ("hidden_size", [48], "got [48], expected a valid integer"),
        ("num_hidden_layers", True, "got True, expected a valid integer"),
        ("num_hidden_layers", 2.0, "got 2.0, expected a valid integer"),
        ("num_hidden_layers", 2.5, "got 2.5, expected a valid integer"),
        ("num_hidden_layers", 10**9, "got 1000000000, expected less than or equal to 10000"),
        ("num_attention_heads", 0, "got 0, expected greater than 0"),
        ("num_attention_heads", "4", "got '4', expected a valid integer"),
        ("num_key_value_heads", 0, "got 0, expected greater than 0"),
        ("num_key_value_heads", 3, "got 3, expected a divisor of 4 heads"),
        ("num_key_value_heads", 8, "got 8, expected a divisor of 4 heads"),
        ("head_dim", 15, "got 15, expected an even number, as rotary embedding pairs columns"),
        ("head_dim", True, "got True, expected a valid integer"),
        ("rms_norm_eps", "1e-5", "got '1e-5', expected a valid number"),
        ("rms_norm_eps", 0, "got 0, expected greater than 0"),
        ("rms_norm_eps", float("nan"), "got nan, expected a finite number"),
        ("rms_norm_eps", float("inf"), "got inf, expected a finite number"),
        ("max_position_embeddings", 0, "got 0, expected greater than 0"),
        ("tie_word_embeddings", 1, "got 1, expected a valid boolean"),
        ("tie_word_embeddings", "false", "got 'false', expected a valid boolean"),
        ("attention_bias", "no", "got 'no', expected a valid boolean"),
        ("sliding_window", -1, "got -1, expected greater than 0"),
        ("vocab_size", 10**400, f"got 1{'0' * 56}..., expected less than or equal to 1e+09"),
        ("max_position_embeddings", 2**31, "got 2147483648, expected less than or equal to 1e+09"),
        ("rms_norm_eps", 2, "got 2, expected less than or equal to 1"),
        ("rope_theta", 1e300, "got 1e+300, expected less than or equal to 1e+15"),
        ("layer_types", ["full_attention"], "got 1 of them, expected 2, one for each layer"),
        ("layer_types", "full", "got 'full', expected a list of strings"),
        ("rms_norm_eps", 10**400, f"got 1{'0' * 56}..., expected a finite number"),
        ("rope_theta", 10**400, f"got 1{'0' * 56}..., expected a finite number"),
        ("rope_theta", True, "got True, expected a number"),
        ("rope_theta", "1e4", "got '1e4', expected a number"),
        ("rope_theta", -1, "got -1, expected greater than 0"),
        ("rope_theta", float("inf"), "got inf, expected a finite number"),
        ("rope_scaling", "linear", "got 'linear', expected an object or null"),
        ("rope_parameters", [1], "got [1], expected an object or null"),
        ("architectures", ..., f"got nothing beside model_type llama, expected a list with {SUPPORTED}"),
        ("architectures", [], f"got nothing beside model_type llama, expected a list with {SUPPORTED}"),
        ("architectures", "Llama", f"got Llama beside model_type llama, expected a list with {SUPPORTED}"),
        ("architectures", [3], "got 3, expected a valid string"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(key, value, message):
    assert refusal(config(**{key: value})) == f'"{key}" in m/config.json: {message}'


@pytest.mark.parametrize("heads", [5, 7])
def test_a_head_dim_that_does_not_come_out_even_is_refused(heads):
    assert refusal(config(head_dim=..., num_attention_heads=heads)) == (
        f'"hidden_size" in m/config.json: got 48, expected a multiple of num_attention_heads {heads}, or a head_dim'
    )


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "factor": "x"}, "\"factor\" in m/config.json: got 'x', expected a valid number"),
        ({"rope_type": "linear", "factor": 0}, '"factor" in m/config.json: got 0, expected greater than 0'),
        (
            {"rope_theta": float("inf")},
            '"rope_parameters.rope_theta" in m/config.json: got inf, expected a finite number',
        ),
        (
            {"rope_theta": [1]},
            '"rope_parameters.rope_theta" in m/config.json: got [1], expected a number',
        ),
        (
            {**LLAMA3, "original_max_position_embeddings": 64.5},
            '"original_max_position_embeddings" in m/config.json: got 64.5, expected a valid integer',
        ),
    ],
)
def test_rope_parameters_that_make_no_sense_are_named(rope, message):
    assert refusal(with_rope({"rope_parameters": rope})) == message


@pytest.mark.parametrize(
    ("changes", "what", "got", "expected"),
    [
        ({"torch_dtype": "float64"}, '"torch_dtype"', "float64", "float32, float16 or bfloat16"),
        ({"torch_dtype": ..., "dtype": "int8"}, '"dtype"', "int8", "float32, float16 or bfloat16"),
        ({"torch_dtype": ["x"]}, '"torch_dtype"', "['x']", "float32, float16 or bfloat16"),
        ({"hidden_act": "gelu"}, '"hidden_act"', "gelu", ACTIVATIONS),
        ({"hidden_act": " ge\n\r\u2028lu"}, '"hidden_act"', "ge lu", ACTIVATIONS),  # a message is one line
        ({"rope_scaling": {"type": "mrope"}}, "rope type", "mrope", ROPE_TYPES),
        ({"rope_scaling": {"type": ["x"]}}, "rope type", "['x']", ROPE_TYPES),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope type", "ntk", ROPE_TYPES),
    ],
)
def test_what_is_sound_but_unknown_is_named_with_what_is_known(changes, what, got, expected):
    message = refusal(config(**changes), UnsupportedError)
    assert message == f"{what} in m/config.json: got {got}, expected {expected}"


# --- what is written


@pytest.mark.parametrize("dtype_key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dialect", [0, 1], ids=["old", "new"])
@pytest.mark.parametrize("rope", ROPE_DIALECTS, ids=ROPE_IDS)
def test_what_is_written_reads_as_what_was_read_in_both_dialects(rope, dialect, dtype_key):
    raw = with_rope(rope[dialect], torch_dtype=...)
    raw = {key: value for key, value in raw.items() if value is not ...} | {dtype_key: "float16"}
    parsed = parse(raw)
    written = both_dialects(raw, parsed, DType.F16)
    assert json.loads(json.dumps(written)) == written
    assert parse(written) == parsed
    old_keys, new_keys = {"torch_dtype", "rope_theta", "rope_scaling"}, {"dtype", "rope_parameters"}
    assert old_keys | new_keys <= written.keys()
    for other in (old_keys, new_keys):
        assert parse({key: value for key, value in written.items() if key not in other}) == parsed


def test_the_old_dialect_has_no_scaling_when_there_is_none():
    written = both_dialects(config(), parse(config()), DType.BF16)
    assert written["rope_scaling"] is None
    assert written["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize("dialect", [0, 1], ids=["old", "new"])
def test_linear_scaling_is_written_by_the_names_that_each_dialect_takes(dialect):
    raw = with_rope(ROPE_DIALECTS[2][dialect])  # type: ignore[arg-type]
    written = both_dialects(raw, parse(raw), DType.BF16)
    # MindIE knows rope_type dynamic, yarn and llama3 only, and linear as a type.
    assert written["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert written["rope_parameters"] == {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}


def test_llama3_scaling_is_written_by_one_name_in_both_dialects():
    raw = with_rope(ROPE_DIALECTS[1][0])
    written = both_dialects(raw, parse(raw), DType.BF16)
    assert written["rope_scaling"] == LLAMA3
    assert written["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}


def test_a_dtype_that_the_config_did_not_say_is_written():
    raw = config(torch_dtype=...)
    written = both_dialects(raw, parse(raw), DType.F16)
    assert written["torch_dtype"] == written["dtype"] == "float16"


def test_other_keys_are_kept_and_the_input_is_not_changed():
    raw = config(vendor={"a": [1]}, quantization_config=None)
    before = json.dumps(raw)
    written = both_dialects(raw, parse(raw), DType.BF16)
    assert json.dumps(raw) == before
    assert {key: written[key] for key in raw if key != "quantization_config"} == {
        key: value for key, value in raw.items() if key != "quantization_config"
    }


def test_what_an_older_quantization_said_is_dropped():
    raw = config(quantize="w8a8")
    assert "quantize" not in both_dialects(raw, parse(raw), DType.BF16)


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"type": "linear", "rope_type": "llama3", "factor": 2.0}, "got 'linear' and 'llama3', expected one"),
        ({"rope_type": "linear"}, "rope scaling linear in .*: got no factor, expected a number"),
        ({"rope_type": "llama3", "factor": 8.0}, "got no low_freq_factor, high_freq_factor, original_max_position"),
        ({"rope_type": "yarn", "factor": 4}, "yarn in .*: got no original_max_position_embeddings, expected a number"),
        ({"type": "dynamic"}, "rope scaling dynamic in .*: got no factor, expected a number"),
        ({**LONGROPE, "long_factor": None}, "longrope in .*: got no long_factor, expected a list of numbers"),
    ],
)
def test_half_said_rope_scaling_is_refused(rope, text):
    with pytest.raises(ConfigError, match=text):
        parse(config(rope_scaling=rope))


@pytest.mark.parametrize("value", [0.5, "1", [1]])
@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_scaling", "rope_parameters"])
def test_partial_rotation_is_refused(key, value):
    raw = {key: value} if key == "partial_rotary_factor" else {key: {"rope_type": "default", PARTIAL: value}}
    assert PARTIAL in refusal(config(**raw), UnsupportedError)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "kind", "message"),
    [
        (
            {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}},
            UnsupportedError,
            "got settings for full_attention, sliding_attention, expected the same for all layers",
        ),
        (
            {"rope_theta": 5e5, "full_attention": {"rope_type": "default"}},
            UnsupportedError,
            "got settings for full_attention, expected the same for all layers",
        ),
        ({"factor": 4}, ConfigError, f"got factor without a rope_type, expected one of {ROPE_TYPES}"),
        (
            {"rope_type": "default", "factor": 4},
            UnsupportedError,
            "got factor, expected rope_type, rope_theta, which are all that default has",
        ),
        (
            {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64},
            UnsupportedError,
            "got original_max_position_embeddings, expected rope_type, rope_theta, factor, "
            "which are all that linear has",
        ),
    ],
)
def test_rope_settings_that_would_be_ignored_are_refused(rope, kind, message, key):
    raw = with_rope({"rope_theta": ..., key: rope})
    assert refusal({name: value for name, value in raw.items() if value is not ...}, kind) == (
        f'"{key}" in m/config.json: {message}'
    )


@pytest.mark.parametrize("base", ["rope_theta", "rope_parameters"])
def test_the_base_inside_rope_scaling_is_compared(base):
    other = (
        {"rope_theta": 2.0} if base == "rope_theta" else {base: {"rope_type": "linear", "factor": 2, "rope_theta": 2}}
    )
    message = refusal(with_rope({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}, **other}))
    assert "expected the same base" in message
    assert "7" in message


def test_an_empty_band_of_llama3_is_refused():
    message = refusal(with_rope({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}))
    assert message == '"high_freq_factor" in m/config.json: got 1, expected more than low_freq_factor 1'


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**YARN, "factor": 0.5}, '"factor" in m/config.json: got 0.5, expected at least 1, for rope type yarn'),
        ({**YARN, "factor": "4"}, "\"factor\" in m/config.json: got '4', expected a valid number"),
        (
            {**YARN, "factor": 1e12},
            '"factor" in m/config.json: got 1e+12 times 32 positions, expected at most 1000000000',
        ),
        ({**YARN, "original_max_position_embeddings": 0}, "expected greater than 0"),
        ({**YARN, "attention_factor": 0}, '"attention_factor" in m/config.json: got 0, expected greater than 0'),
        ({**YARN, "beta_slow": 17}, '"beta_fast" in m/config.json: got 16, expected at least beta_slow, 17'),
        ({**YARN, "truncate": 1}, '"truncate" in m/config.json: got 1, expected a valid boolean'),
        ({**YARN, "mscale": -1}, "expected greater than or equal to 0"),
        ({**YARN, "rope_theta": 1}, '"rope_theta" in m/config.json: got 1, expected more than 1, for rope type yarn'),
        ({**YARN, "finetuned": True}, "got finetuned, expected rope_type, rope_theta, factor, original_max_position"),
        ({"type": "dynamic", "factor": 0.99}, "got 0.99, expected at least 1, for rope type dynamic"),
        ({"type": "dynamic", "factor": 2, "original_max_position_embeddings": 32}, "which are all that dynamic has"),
        ({**LONGROPE, "long_factor": [1, 2, 3]}, "got 3 numbers, expected 8, one for each pair of a head's channels"),
        (
            {**LONGROPE, "short_factor": [1] * 7 + [0]},
            '"short_factor" in m/config.json: got 0, expected greater than 0',
        ),
        ({**LONGROPE, "short_factor": 1.0}, '"short_factor" in m/config.json: got 1.0, expected a list of numbers'),
        ({**LONGROPE, "factor": 0.5}, "got 0.5, expected at least 1, for rope type longrope"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "got 1, expected at least 2, for rope type longrope"),
    ],
)
def test_wrong_values_of_longer_contexts_are_refused(rope, message):
    assert message in refusal(with_rope({"rope_scaling": rope}), EightfoldError)  # type: ignore[type-abstract]


def test_dynamic_scaling_needs_two_pairs_of_channels():
    raw = with_rope({"rope_scaling": {"type": "dynamic", "factor": 2}}, head_dim=2)
    assert refusal(raw) == '"head_dim" in m/config.json: got 2, expected at least 4, for rope type dynamic'


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_the_original_context_may_stand_beside_the_settings(kind):
    rope = {"yarn": YARN, "longrope": LONGROPE, "llama3": LLAMA3}[kind]
    beside = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    without = {name: value for name, value in rope.items() if name not in beside}
    assert parse(with_rope({"rope_scaling": without, **beside})) == parse(with_rope({"rope_scaling": rope}))
    message = refusal(with_rope({"rope_scaling": rope, "original_max_position_embeddings": 77}))
    assert "got 77, and " in message
    assert "expected the same" in message


@pytest.mark.parametrize(
    ("rope", "position_embeddings", "context", "reach"),
    [
        (None, 128, 128, 128),
        ({"type": "linear", "factor": 4.0}, 128, 128, 128),
        (YARN, 32, 128, 128),  # as Qwen2.5 says it
        (YARN, 128, 128, 128),
        ({**YARN, "factor": 3.97}, 32, 127, 127),
        ({"type": "dynamic", "factor": 4.0}, 32, 32, 128),
        (LONGROPE, 128, 128, 128),
    ],
)
def test_how_far_a_model_looks_back(rope, position_embeddings, context, reach):
    found = parse(with_rope({"rope_scaling": rope}, max_position_embeddings=position_embeddings))
    assert (found.context, found.reach) == (context, reach)


@pytest.mark.parametrize(
    ("rope", "names"),
    [(YARN, {"type", "rope_type"}), ({"type": "dynamic", "factor": 2.0}, {"type", "rope_type"}), (LONGROPE, {"type"})],
)
def test_longer_contexts_are_written_as_they_were_said(rope, names):
    """And where the file has no older dialect, by every name that its readers know."""
    kind = rope.get("type") or rope["rope_type"]
    settings = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
    for said in ({"type": kind}, {"rope_type": kind}, {"type": kind, "rope_type": kind}):
        raw = with_rope({"rope_scaling": {**said, **settings}})
        assert both_dialects(raw, parse(raw), DType.BF16)["rope_scaling"] == {**said, **settings}
    raw = with_rope({"rope_parameters": {"rope_type": kind, **settings}})
    assert both_dialects(raw, parse(raw), DType.BF16)["rope_scaling"] == {**dict.fromkeys(names, kind), **settings}


@pytest.mark.parametrize("nothing", [None, {}, {"rope_type": None, "factor": None}])
def test_rope_settings_that_say_nothing_are_none(nothing):
    assert parse(config(rope_scaling=nothing, rope_theta=7)).rope == RopeParameters(rope_theta=7.0)


# --- families

OTHERS: dict[str, dict[str, Any]] = {
    "ChatGLMModel": {"model_type": "chatglm", "padded_vocab_size": 65024, "num_layers": 28},
    "DeepseekV3ForCausalLM": {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "factor": 40}},
    "Llama4ForConditionalGeneration": {"model_type": "llama4", "text_config": {"hidden_size": 5120}},
    "Qwen3_5ForConditionalGeneration": {"model_type": "qwen3_5", "vision_config": {}},
    "Glm4MoeForCausalLM": {"model_type": "glm4_moe", "n_routed_experts": 128},
    "Qwen3NextForCausalLM": {"model_type": "qwen3_next", "layer_types": ["linear_attention"]},
    "GemmaForCausalLM": {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"},
    "GPT2LMHeadModel": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12},
    "BloomForCausalLM": {"model_type": "bloom", "n_head": 16},
    "MambaForCausalLM": {"model_type": "mamba", "state_size": 16},
    "LlamaForSequenceClassification": {"model_type": "llama", "num_labels": 1},
    "llamaforcausallm": {"model_type": "llama"},
    "LlamaForCausalLM and MistralForCausalLM": {"model_type": "llama"},
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_another_family_is_refused_for_what_it_is(architecture):
    raw = {"architectures": architecture.split(" and "), **OTHERS[architecture], "torch_dtype": "int4"}
    assert refusal(raw, UnsupportedError) == (
        f"architecture in m/config.json: got {architecture}, expected {SUPPORTED}"
    )


def test_without_an_architecture_the_model_type_is_named():
    assert refusal({"model_type": "mamba", "d_model": 768}) == (
        f'"architectures" in m/config.json: got nothing beside model_type mamba, expected a list with {SUPPORTED}'
    )


def test_a_model_type_of_another_family_is_refused():
    assert refusal(config(model_type="gemma")) == (
        '"model_type" in m/config.json: got gemma, expected llama, which is that of LlamaForCausalLM. '
        "Correct the one that is wrong: loaders choose a model's code by either."
    )
    assert parse(config(model_type=...)) == parse(config(model_type=None)) == parse(config())


@pytest.mark.parametrize("absent", [..., None])
@pytest.mark.parametrize("architecture", [*FAMILIES, *SPARSE])
def test_absent_fields_have_the_defaults_of_their_class(architecture, absent):
    """Null counts as absent, but for key/value heads, of which it makes as many as query heads."""
    import transformers

    theirs = getattr(transformers, f"{architecture.removesuffix('ForCausalLM')}Config")
    sizes = {"num_attention_heads": 64, "hidden_size": 256}
    optional = ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "head_dim")
    names = (*optional, "mlp_bias", "rms_norm_eps", "rope_theta")
    parsed = parse(config(architecture=architecture, **sizes, **dict.fromkeys(names, absent)))
    expected = theirs(**sizes)
    for name in ("max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(parsed, name) == getattr(expected, name), name
    assert parsed.num_kv_heads == (expected.num_key_value_heads if absent is ... else 64)
    assert parsed.head_dim == (getattr(expected, "head_dim", None) or 4)
    assert (parsed.attention_bias, parsed.mlp_bias) == (False, False)
    assert parsed.rope.rope_theta == expected.rope_parameters["rope_theta"]


@pytest.mark.parametrize("absent", [..., None])
@pytest.mark.parametrize("architecture", SPARSE)
def test_absent_settings_of_experts_have_the_defaults_of_their_class(architecture, absent):
    import transformers

    expected = getattr(transformers, f"{architecture.removesuffix('ForCausalLM')}Config")()
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    found = parse(config(architecture=architecture, **dict.fromkeys((*names, "norm_topk_prob"), absent))).experts
    assert found is not None
    assert (found.count, found.per_token) == (expected.num_experts, expected.num_experts_per_tok)
    # Mixtral has one width for all, and always normalizes.
    assert found.intermediate_size == getattr(expected, "moe_intermediate_size", 80)
    assert found.normalizes is getattr(expected, "norm_topk_prob", True)
    assert found.shared_size == getattr(expected, "shared_expert_intermediate_size", 0)
    assert (found.every, found.dense_layers) == (getattr(expected, "decoder_sparse_step", 1), ())
    assert parse(config(num_experts=4)).experts is None  # of a family without them


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("architecture", SPARSE)
def test_the_number_of_experts_is_read_by_any_name_and_written_by_both(tmp_path, architecture, key):
    from transformers import AutoConfig

    raw = config(architecture=architecture, **{"num_experts": ..., key: 7})
    parsed = parse(raw)
    assert parsed.experts is not None
    assert parsed.experts.count == 7
    written = both_dialects(raw, parsed, DType.BF16)
    assert (written["num_experts"], written["num_local_experts"]) == (7, 7)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_experts == 7
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    assert parse(read_json(again / "config.json")).experts == parsed.experts


def test_which_layers_have_experts():
    def sparse(**fields: Any) -> list[int]:
        parsed = parse(config(architecture="Qwen3MoeForCausalLM", num_hidden_layers=8, **fields))
        return [layer_idx for layer_idx in range(8) if parsed.is_sparse(layer_idx)]

    assert sparse() == sparse(mlp_only_layers=None) == sparse(mlp_only_layers=[]) == [*range(8)]
    assert sparse(decoder_sparse_step=3) == [2, 5]
    assert sparse(decoder_sparse_step=9) == []
    assert sparse(decoder_sparse_step=2, mlp_only_layers=[0, 3, 8]) == [1, 5, 7]


def test_head_sizes_that_the_family_implies_are_written():
    sizes = {"num_attention_heads": 32, "num_key_value_heads": ..., "head_dim": ...}
    raw = config(architecture="Qwen3ForCausalLM", **{**sizes, "hidden_size": 64})
    written = both_dialects(raw, parse(raw), DType.BF16)
    assert (written["num_key_value_heads"], written["head_dim"]) == (32, 128)
    raw = config(**{**sizes, "hidden_size": 64})
    written = both_dialects(raw, parse(raw), DType.BF16)
    assert {"num_key_value_heads", "head_dim"}.isdisjoint(written)


def test_heads_that_the_file_does_not_name_are_explained():
    assert refusal(config(architecture="MistralForCausalLM", num_key_value_heads=...)) == (
        '"num_key_value_heads" in m/config.json: got 8, which MistralForCausalLM has where nothing is said, '
        "expected a divisor of 4 heads"
    )


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("LlamaForCausalLM", {}), ("Qwen2ForCausalLM", {}), ("Qwen3ForCausalLM", {"use_sliding_window": False})],
)
@pytest.mark.parametrize("window", [0, None, False])
def test_no_window_may_be_said_by_0_where_none_is_used(architecture, changes, window):
    assert parse(config(architecture=architecture, sliding_window=window, **changes)).sliding_window is None


@pytest.mark.parametrize(
    ("architecture", "changes"), [("MistralForCausalLM", {}), ("Qwen2ForCausalLM", {"use_sliding_window": True})]
)
def test_a_window_of_0_is_refused_where_one_is_used(architecture, changes):
    message = refusal(config(architecture=architecture, sliding_window=0, **changes))
    assert message == '"sliding_window" in m/config.json: got 0, expected greater than 0'


def test_layer_types_that_cannot_be_obeyed_are_refused():
    qwen = {"architecture": "Qwen2ForCausalLM", "layer_types": ["full_attention", "sliding_attention"]}
    assert refusal(config(**qwen)) == (
        '"layer_types" in m/config.json: got sliding_attention, expected full_attention alone, '
        "as use_sliding_window is not true"
    )
    assert parse(config(**qwen, use_sliding_window=True)).layer_types is not None
    message = refusal(config(layer_types=["full_attention", "linear_attention"]), UnsupportedError)
    assert (
        message == '"layer_types" in m/config.json: got linear_attention, expected full_attention or sliding_attention'
    )


@pytest.mark.parametrize("value", [None, {}, {"quant_method": "gptq"}])
def test_quantization_config_is_dropped(value):
    raw = config(quantization_config=value)
    assert "quantization_config" not in both_dialects(raw, parse(raw), DType.BF16)


@pytest.mark.parametrize("dialect", [0, 1], ids=["old", "new"])
@pytest.mark.parametrize("rope", ROPE_DIALECTS, ids=ROPE_IDS)
def test_transformers_reads_the_config_that_quantize_writes(cli, tmp_path, rope, dialect):
    from transformers import AutoConfig

    from tests.conftest import write_model

    source = write_model(tmp_path / "m", with_rope(rope[dialect]), tokenizer=False)
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a16").code == 0
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    expected = {"rope_theta": rope[2].rope_theta, **rope[1]["rope_parameters"]}
    assert {key: value for key, value in theirs.rope_parameters.items() if key != "type"} == expected
    assert str(theirs.dtype) == "torch.bfloat16"
    assert (theirs.head_dim, theirs.num_key_value_heads) == (16, 2)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_reads_the_same_model_out_of_it(tmp_path, architecture):
    from transformers import AutoConfig

    raw = config(architecture=architecture)
    written = both_dialects(raw, parse(raw), DType.BF16)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == [architecture]
    assert theirs.rope_parameters["rope_theta"] == 10000.0
    assert not hasattr(theirs, "quantization_config")


# --- JSON


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_any_unicode_encoding(tmp_path, encoding):
    (tmp_path / "f.json").write_bytes('{"é": 1}'.encode(encoding))
    assert read_json(tmp_path / "f.json") == {"é": 1}


def json_refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_json(path)
    return str(error.value)


def test_a_missing_json_file_is_named(tmp_path):
    assert json_refusal(tmp_path / "f.json") == f"f.json in {tmp_path}: got no such file, expected a regular file"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}'])
def test_a_key_that_stands_twice_is_refused_at_any_depth(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    assert json_refusal(tmp_path / "f.json") == (
        f'key "a" in {tmp_path}/f.json: got two values, expected one. Remove one.'
    )


@pytest.mark.parametrize(("content", "kind"), [(b"[]", "list"), (b"null", "NoneType"), (b"7", "int"), (b'"x"', "str")])
def test_json_that_is_no_object_is_refused(tmp_path, content, kind):
    (tmp_path / "f.json").write_bytes(content)
    assert json_refusal(tmp_path / "f.json") == (
        f"JSON in {tmp_path}/f.json: got a {kind}, expected a JSON object. Fetch the file again."
    )


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe\xff", b"[" * 100_000, b"{}{}", b"1" * 5000])
def test_what_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    message = json_refusal(tmp_path / "f.json")
    assert message.startswith(f"JSON in {tmp_path}/f.json: got ")
    assert message.endswith(", expected a JSON object. Fetch the file again.")


@pytest.mark.parametrize("named", [None, 5, [], [5], [["LlamaForCausalLM"]], {"a": 1}, "LlamaForCausalLM"])
def test_what_names_no_architecture_has_no_engine(named):
    assert has_engine({"architectures": named}) is False
