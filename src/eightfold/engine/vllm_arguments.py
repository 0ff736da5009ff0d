"""vLLM's arguments of LLM: which are known here by another name, which change nothing, and which are refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from eightfold.engine.settings import EngineConfig
from eightfold.errors import InputError, one_of
from eightfold.files import has_file, read_json
from eightfold.values import shown

_OURS = tuple(each.name for each in fields(EngineConfig))

_RENAMED = {
    "enable_expert_parallel": "expert_parallel",
    "enable_prefix_caching": "prefix_caching",
    "kv_cache_memory_bytes": "kv_memory",
    "max_num_batched_tokens": "max_batched_tokens",
}

# They change no answer, only how vLLM spends an accelerator or writes its log.
_WITHOUT_EFFECT = (
    "async_scheduling", "block_size", "compilation_config", "disable_custom_all_reduce", "disable_log_stats",
    "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enforce_eager",
    "gpu_memory_utilization", "max_seq_len_to_capture", "num_gpu_blocks_override", "served_model_name", "swap_space",
    "trust_remote_code", "use_tqdm_on_load",
)  # fmt: skip

_IN_DIRECTORY = "The directory says it."

# Argument -> values that ask for nothing else than what is done anyway, and what to do instead of others.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "config_format": (("auto", "hf"), ""),
    "cpu_offload_gb": ((0,), "The model is in the CPU's memory anyway."),
    "data_parallel_size": ((1,), "Start several programs."),
    "enable_lora": ((False,), "Merge the adapter into the model before it is quantized."),
    "generation_config": (("vllm",), "Give SamplingParams."),
    "hf_overrides": (({},), "Change the directory's config.json."),
    "kv_cache_dtype": (("auto",), _IN_DIRECTORY),
    "limit_mm_per_prompt": (({},), "Only text is read."),
    "load_format": (("auto", "safetensors"), ""),
    "override_generation_config": (({},), "Give SamplingParams."),
    "pipeline_parallel_size": ((1,), "Start the program with torchrun."),
    "quantization": (("ascend",), _IN_DIRECTORY),
    "revision": ((), "Name the directory that has it."),
    "runner": (("auto", "generate"), "Text is generated."),
    "skip_tokenizer_init": ((False,), ""),
    "speculative_config": ((), "Use `speculate` or `draft_model`."),
    "task": (("auto", "generate"), "Text is generated."),
    "tensor_parallel_size": ((1,), "Start the program with torchrun."),
    "tokenizer_mode": (("auto",), ""),
    "tokenizer_revision": ((), "Name the directory that has it."),
}


def read_arguments(given: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of EngineConfig that arguments by our names or vLLM's mean, and those that change nothing.

    Args:
        given: by name.
        directory: of the model.

    Raises:
        InputError: nobody knows an argument, or it asks for what is not done.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        ours = _RENAMED.get(name, name)
        if ours in _OURS:
            if ours in found:
                raise InputError(f"LLM: {name}", got=f"`{ours}` too", expected="one of them")
            found[ours] = value
        elif name == "dtype":
            require_neutral("LLM: dtype", value, ("auto", *_own_dtype(directory)), _IN_DIRECTORY)
        elif name in _REFUSED:
            require_neutral(f"LLM: {name}", value, *_REFUSED[name])
        elif name not in _WITHOUT_EFFECT:
            raise unknown("LLM", name, (*_OURS, *_RENAMED, *_REFUSED, *_WITHOUT_EFFECT, "dtype", "seed", "tokenizer"))
    return found, [name for name in given if name in _WITHOUT_EFFECT]


def _own_dtype(directory: Path) -> list[str]:
    """Return what config.json calls the type of the weights; what is wrong with the file, others say."""
    path = directory / "config.json"
    raw = read_json(path) if has_file(path) else {}
    own = raw.get("dtype") or raw.get("torch_dtype")
    return [own] if isinstance(own, str) else []


def require_neutral(where: str, value: Any, neutral: tuple[Any, ...], advice: str) -> None:
    """Refuse a value of an argument that is not supported, unless it is None or asks for nothing."""
    if value is not None and not any(value == same and type(value) is type(same) for same in neutral):
        expected = one_of(map(repr, neutral)) if neutral else "none"
        raise InputError(where, got=shown(value), expected=expected, action=advice)


def unknown(where: str, name: str, known: tuple[str, ...]) -> InputError:
    """Return the error for an argument that nobody knows."""
    near = difflib.get_close_matches(name, known, 1)
    action = f"Did you mean `{near[0]}`?" if near else ""
    return InputError(f"{where}: got the argument {name}, which it does not know", action=action)
