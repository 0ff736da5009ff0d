"""The config.json of the models whose shapes can be made, as their publishers have them."""

from __future__ import annotations

from typing import Any

from eightfold.config import CONFIG_DTYPES, DType
from eightfold.errors import ConfigError, one_of

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 128256,
}

_LLAMA32_ROPE: dict[str, Any] = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

MODELS: dict[str, dict[str, Any]] = {
    "llama3-70b": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "llama3-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama3.2-1b": {
        **_LLAMA3,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": _LLAMA32_ROPE,
        "tie_word_embeddings": True,
    },
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


def model_config(name: str, layers: int | None, dtype: DType) -> dict[str, Any]:
    """Return a config.json object.

    Args:
        name: one of MODELS.
        layers: how many to have; None for as many as the model has.
        dtype: what the weights are going to be stored in.

    Raises:
        ConfigError: a name or a number of layers that there is not.
    """
    if name not in MODELS:
        raise ConfigError("like", got=name, expected=one_of(MODELS))
    config = dict(MODELS[name])
    if layers is not None:
        if not 0 < layers <= config["num_hidden_layers"]:
            raise ConfigError("layers", got=layers, expected=f"1 to {config['num_hidden_layers']}, as {name} has")
        config["num_hidden_layers"] = layers
    config["torch_dtype"] = next(known for known, kind in CONFIG_DTYPES.items() if kind is dtype)
    return config
