"""The metadata of a GGUF file, as far as it follows from config.json.

Sources: the format's specification (github.com/ggml-org/ggml, docs/gguf.md); llama.cpp for what its readers do with
sliding windows, biases and stretched rotary frequencies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.config import ModelConfig
from eightfold.errors import UnsupportedError, one_of
from eightfold.families import sliding_window
from eightfold.format.gguf_layout import PAIRED, WRITTEN_AS
from eightfold.model.layers import inverse_frequencies, rope_scale
from eightfold.rope import RopeParameters

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGNED = "eightfold"  # general.quantized_by of our files


def require_architecture(config: ModelConfig, where: Path) -> str:
    """Return the name of a model's architecture in GGUF.

    Raises:
        UnsupportedError: a family or a setting of it that this export does not write.
    """

    def refused(what: str, got: Any, expected: str) -> UnsupportedError:
        action = "llama.cpp's own converter may know the float model."
        return UnsupportedError(f"{what} to export to gguf", where=where, got=got, expected=expected, action=action)

    written = WRITTEN_AS.get(config.architecture)
    if written is None:
        raise refused("architecture", config.architecture, one_of(WRITTEN_AS))
    if config.activation != "silu":
        raise refused("activation", config.hidden_act, "silu")
    if written == "qwen3" and config.attention_bias:
        raise refused("attention_bias", "true", "false, as llama.cpp's qwen3 has it")
    rope = config.rope
    if rope.rope_type == "longrope" or (rope.rope_type == "llama3" and written != PAIRED):
        raise refused("rope type", rope.rope_type, "default, linear, yarn, dynamic, or llama3 in a Llama")
    # llama.cpp computes the factor of YaRN, and the places between which it blends, by itself.
    plain = RopeParameters(rope_type="yarn", factor=rope.factor)
    if rope.rope_type == "yarn" and (not rope.truncate or abs(rope_scale(rope) / rope_scale(plain) - 1) > 1e-6):
        raise refused("yarn", "truncate false, or an attention_factor of its own", "what follows from the factor")
    return written


def architecture_fields(config: ModelConfig, name: str) -> dict[str, Any]:
    """Return the fields of the architecture `name`: sizes, norms and the rotary embedding; context in positions."""
    rope = config.rope
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": rope.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if rope.rope_type in ("linear", "yarn"):
        fields["rope.scaling.type"] = rope.rope_type
        fields["rope.scaling.factor"] = float(rope.factor)
    if rope.rope_type == "yarn":
        fields["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        fields["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        fields["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
    return {f"{name}.{key}": value for key, value in fields.items()}


def rope_divisors(config: ModelConfig) -> NDArray[Any] | None:
    """Return what each rotary frequency is divided by, (D/2,) float32, where GGUF holds that as a tensor."""
    if config.rope.rope_type != "llama3":
        return None
    plain = inverse_frequencies(RopeParameters(rope_theta=config.rope.rope_theta), config.head_dim, 0)
    divisors: NDArray[Any] = plain / inverse_frequencies(config.rope, config.head_dim, 0)
    return divisors


def lost_settings(config: ModelConfig) -> list[str]:
    """Return what of config.json the readers do not have."""
    losses = []
    windows = {window for i in range(config.num_layers) if (window := sliding_window(config, i)) is not None}
    if windows and min(windows) < config.context:
        losses.append(f"the sliding window of {min(windows)} positions: longer texts see all of them")
    if config.rope.rope_type == "dynamic":
        losses.append(f"dynamic rotary scaling: texts of more than {config.max_position_embeddings} tokens")
    return losses
