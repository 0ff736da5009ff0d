"""GGUF -> a float model directory, one tensor in memory at a time.

The gguf package widens block formats to float32, and transformers rebuilds the tokenizer; container.py reads the rest.
Here are the names, the configuration, and the one thing that differs in the numbers: files of the `llama`
architecture hold the rows of q and k in the order in which RoPE rotates neighbours, and model directories in the
order in which it rotates halves.

Letters: H heads, D head_dim, E hidden size.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eightfold.config import CONFIG_DTYPES, DType, ModelConfig, parse_config
from eightfold.errors import CheckpointError, DependencyError, OutputError, UnsupportedError, one_of, shortlist
from eightfold.families import all_linears, all_norms
from eightfold.files import MAX_LIST_BYTES, read_json, write_json
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.gguf_layout import (
    ARCHITECTURES,
    LAYER_MODULES,
    MODULES,
    NAMES,
    PAIRED,
    ROPE_FACTORS,
    require_gguf,
    unpair,
)
from eightfold.format.gguf_pretokenizers import cut_named, write_cut
from eightfold.format.journal import FORMAT
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, ShardedWriter, total_bytes
from eightfold.format.tokenizer_files import write_for_both
from eightfold.importers.container import StoredTensor, read_container
from eightfold.model.layers import inverse_frequencies
from eightfold.model.reference.tensors import require_range, to_array
from eightfold.progress import Progress, by_bytes, silent
from eightfold.rope import RopeParameters
from eightfold.scheme import BIAS, WEIGHT, weight_name
from eightfold.values import COUNT, POSITIVE, require, shorten, shown
from eightfold.vocabulary import TOKENIZER
from eightfold.written_config import both_dialects

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYER_NAME = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.(weight|bias)$")

_DIVISORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_NO_WEIGHTS = (ROPE_FACTORS, *_DIVISORS.values())


@dataclass(frozen=True)
class GgufFile:
    """An open file, with what the gguf package knows of types."""

    path: Path  # of the part that has the metadata
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    dequantize: Callable[[NDArray[Any], Any], NDArray[np.float32]]
    kinds: Callable[[int], Any]  # number of a type -> gguf's name of it

    def field(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.fields['general.architecture']}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        return int(require(COUNT, self.field(key, default), key, self.path))

    def number(self, key: str, default: float | None = None) -> float:
        return float(require(POSITIVE, self.field(key, default), key, self.path))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as float32 in its (N, K) shape."""
        stored = self.tensors[name]
        kind = self.kinds(stored.kind)
        try:
            real = self.dequantize(stored.rows(), kind)
        except NotImplementedError:
            raise UnsupportedError(f"tensor type of {name}", where=self.path, got=kind.name) from None
        return torch.from_numpy(real.astype("<f4")).reshape(stored.shape)


def import_gguf(
    source: Path, target: Path, dtype: DType, *, overwrite: bool = False, progress: Progress = silent
) -> ModelConfig:
    """Widen a GGUF file into a float model directory.

    Args:
        source: the file. Only read.
        target: the directory to make; it appears when everything is written.
        dtype: BF16 or F16; values are widened to float32 first and rounded once.
        overwrite: replace what import-gguf has written at `target` before.
        progress: who is told.

    Returns:
        The model's configuration.
    """
    file = open_file(source)
    raw = read_config(file, dtype)
    config = parse_config(raw, source)
    names = match_tensors(file, config)
    plan = [PlannedTensor(name, dtype, file.shape(gguf_name)) for name, gguf_name in names.items()]
    head = {"format": FORMAT, "command": "import-gguf"}
    with Output(target, head, source=source, overwrite=overwrite) as output:
        output.require_space(total_bytes(plan))
        # First: what can fail in seconds should not after minutes.
        write_tokenizer(file.path, output.path, raw, file.fields)
        with (
            ShardedWriter(output.path, "model", plan, metadata={"format": "pt"}) as writer,
            by_bytes(progress, "import", total_bytes(plan)) as task,
        ):
            for name, gguf_name in names.items():
                task.at(name)
                weights = read_float(file, config, name, gguf_name, dtype)
                writer.write(name, weights)
                task.advance(weights.nbytes)
        write_json(output.path / CONFIG_NAME, both_dialects(raw, config, dtype))
        output.finish(writer.file_checksums())
    return config


def open_file(path: Path) -> GgufFile:
    """Open a file of a family that is imported.

    Raises:
        CheckpointError: not there, or damaged.
        DependencyError: the gguf package is not installed.
        UnsupportedError: another family.
    """
    gguf = require_gguf("import-gguf")
    if not path.exists() or path.is_dir():
        raise CheckpointError(f"no file {path}", expected="a .gguf file", action="Check the path.")
    container = read_container(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    fields = container.fields
    architecture = fields.get("general.architecture")
    experts = fields.get(f"{architecture}.expert_count")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES or experts:
        got = shorten(str(architecture)) + (f" with {shorten(str(experts))} experts" if experts else "")
        raise UnsupportedError(
            "architecture", where=path, got=got, expected=f"a dense model of {one_of(ARCHITECTURES)}"
        )
    return GgufFile(container.path, fields, container.tensors, gguf.dequantize, gguf.GGMLQuantizationType)


def read_config(file: GgufFile, dtype: DType) -> dict[str, Any]:
    """Return config.json's object from the metadata."""
    architecture = ARCHITECTURES[file.fields["general.architecture"]]
    heads, hidden = file.count("attention.head_count"), file.count("embedding_length")
    head_dim = file.count("attention.key_length", hidden // heads)
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": file.fields["general.architecture"],
        "dtype": next(name for name, known in CONFIG_DTYPES.items() if known is dtype),
        "attention_bias": architecture != "Qwen2ForCausalLM" and "blk.0.attn_q.bias" in file.tensors,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": file.count("feed_forward_length"),
        "max_position_embeddings": file.count("context_length"),
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "num_attention_heads": heads,
        "num_hidden_layers": file.count("block_count"),
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
        "vocab_size": file.shape("token_embd.weight")[0] if "token_embd.weight" in file.tensors else 0,
    }
    raw["rope_parameters"] = _rope(file, head_dim)
    for name in ("bos", "eos", "padding"):
        token = file.fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            raw["pad_token_id" if name == "padding" else f"{name}_token_id"] = token
    return raw


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    rotated = file.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedError("rotated dimensions", where=file.path, got=rotated, expected=f"head_dim {head_dim}")
    rope: dict[str, Any] = {"rope_theta": file.number("rope.freq_base", 10000.0), "rope_type": "default"}
    rope.update(_scaling(file))
    if ROPE_FACTORS not in file.tensors:
        return rope
    if rope["rope_type"] != "default":
        got = f"{ROPE_FACTORS} beside {rope['rope_type']}"
        raise UnsupportedError("rope scaling", where=file.path, got=got, expected="one of them")
    # Llama 3.1 and later: the file holds the divisor of each frequency, model directories the rule behind them.
    factors = file.tensor(ROPE_FACTORS)
    llama3 = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope.update(rope_type="llama3", original_max_position_embeddings=8192, **llama3)
    if not _are_llama3(factors, rope, head_dim):
        raise UnsupportedError(
            f"rotary factors {ROPE_FACTORS}",
            where=file.path,
            got="a rule that is not Llama 3's",
            expected="that of Llama 3.1",
        )
    return rope


def _scaling(file: GgufFile) -> dict[str, Any]:
    """Return how a file stretches positions, in the words of config.json; longrope is there by its tensors alone."""
    divisors = {key: name for key, name in _DIVISORS.items() if name in file.tensors}
    scaling = file.field("rope.scaling.type", "none")
    kind = "longrope" if divisors and scaling == "none" else scaling
    if kind not in ("none", "linear", "yarn", "longrope") or (divisors and kind != "longrope"):
        got = f"{shorten(str(kind))}{f' beside {next(iter(divisors.values()))}' if divisors else ''}"
        raise UnsupportedError("rope scaling", where=file.path, got=got, expected="none, linear, yarn or longrope")
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("rope.scaling.factor")}
    context = file.count("rope.scaling.original_context_length", file.count("context_length"))
    rope: dict[str, Any] = {"rope_type": kind, "original_max_position_embeddings": context}
    if kind == "longrope":
        # Where the file lacks a factor of attention, it follows from how much longer contexts become.
        rope.update({key: file.tensor(name).flatten().tolist() for key, name in divisors.items()})
        numbers = {"factor": "factor", "attention_factor": "attn_factor"}
    else:
        for key, nothing in {"attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0}.items():
            if (found := file.field(f"rope.scaling.{key}", nothing)) != nothing:
                raise UnsupportedError(f"rope.scaling.{key}", where=file.path, got=shown(found), expected=nothing)
        rope["factor"] = file.number("rope.scaling.factor")
        numbers = {
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
    said = {name: f"rope.scaling.{key}" for name, key in numbers.items()}
    rope.update({name: file.number(key) for name, key in said.items() if file.field(key) is not None})
    return rope


def _are_llama3(factors: torch.Tensor, rope: dict[str, Any], head_dim: int) -> bool:
    if factors.shape != (head_dim // 2,) or not ((factors > 0) & factors.isfinite()).all():
        return False
    plain = inverse_frequencies(RopeParameters(**{**rope, "rope_type": "default"}), head_dim, 0)
    stretched = inverse_frequencies(RopeParameters(**rope), head_dim, 0)
    return torch.allclose(torch.from_numpy(plain / stretched), factors, rtol=1e-3)


def match_tensors(file: GgufFile, config: ModelConfig) -> dict[str, str]:
    """Return the tensors to write, by their name in the directory -> their name in the file.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape.
    """
    names: dict[str, str] = {}
    for name in file.tensors:
        if (known := _directory_name(name)) is not None:
            names[known] = name
    expected: dict[str, tuple[int, ...]] = {weight_name(NAMES.embedding): (config.vocab_size, config.hidden_size)}
    expected.update({weight_name(norm): (size,) for norm, size in all_norms(config).items()})
    for module, linear in all_linears(config).items():
        if module != NAMES.head or not config.tie_word_embeddings:
            expected[weight_name(module)] = (linear.n, linear.k)
            if linear.has_bias:
                expected[f"{module}.{BIAS}"] = (linear.n,)
    missing, foreign = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    unknown = [name for name in file.tensors if _directory_name(name) is None and name not in _NO_WEIGHTS]
    if missing or foreign or unknown:
        raise CheckpointError(
            f"tensors of {config.architecture}",
            where=file.path,
            got=f"no {shortlist(missing)}" if missing else f"also {shortlist(foreign + unknown)}",
            expected=f"{len(expected)} known ones",
        )
    for name, shape in expected.items():
        if file.shape(names[name]) != shape:
            raise CheckpointError(
                f"shape of {names[name]}",
                where=file.path,
                got=list(file.shape(names[name])),
                expected=list(shape),
                action="Fetch it again.",
            )
    return names


def _directory_name(name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    if module in MODULES and kind == WEIGHT:
        return weight_name(MODULES[module])
    found = _LAYER_NAME.match(name)
    if found is None or found[2] not in LAYER_MODULES:
        return None
    return f"{NAMES.layer(int(found[1]))}{LAYER_MODULES[found[2]]}.{found[3]}"


def row_order(file: GgufFile, config: ModelConfig, name: str) -> NDArray[Any] | None:
    """Return which rows of the file those of a tensor of q or k are; None where the order is the same."""
    if file.fields["general.architecture"] != PAIRED:
        return None
    heads = config.num_heads if ".q_proj." in name else config.num_kv_heads if ".k_proj." in name else None
    return None if heads is None else unpair(np.arange(heads * config.head_dim), heads)


def read_float(file: GgufFile, config: ModelConfig, name: str, gguf_name: str, dtype: DType) -> NDArray[Any]:
    """Return a tensor in the order of model directories, rounded once to a float type.

    Raises:
        CheckpointError: a value is not finite, or the type cannot hold it.
    """
    tensor, order = file.tensor(gguf_name), row_order(file, config, name)
    require_range(tensor, dtype, gguf_name, file.path, "Import as bf16.")
    return to_array(tensor if order is None else tensor[torch.from_numpy(order)], dtype)


def write_tokenizer(source: Path, directory: Path, raw: dict[str, Any], fields: dict[str, Any]) -> None:
    """Rebuild the tokenizer with transformers, and write the generation settings that the file knows.

    Args:
        source: the part of the file that has the metadata.
        directory: where to.
        raw: config.json's object.
        fields: the metadata.
    """
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise DependencyError(
            "eightfold import-gguf needs transformers",
            got="none installed",
            action="Install it: pip install 'eightfold[gguf]'",
        ) from None
    logging.disable_progress_bar()
    try:
        # From a directory of its own: transformers would take templates and settings that lie beside the file, and
        # follow links to get them.
        with tempfile.TemporaryDirectory() as alone:
            Path(alone, "model.gguf").symlink_to(source.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    except Exception as error:  # of many kinds: what is missing in the metadata, or in transformers
        raise CheckpointError(
            "tokenizer",
            where=source,
            got=f"{type(error).__name__}: {error}",
            expected="one that transformers can rebuild",
        ) from None
    try:
        tokenizer.save_pretrained(str(directory))
    except OSError:
        raise
    except Exception as error:  # the tokenizers library says so of a full disk
        raise OutputError("tokenizer", where=directory, got=error, expected="room to write it") from None
    _cut_as_said(directory, fields)
    write_for_both(directory)
    ids: dict[str, Any] = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    write_json(directory / "generation_config.json", ids)


def _cut_as_said(directory: Path, fields: dict[str, Any]) -> None:
    """Cut texts as the file says: transformers looks at the architecture, which does not tell."""
    cut = cut_named(str(fields.get("tokenizer.ggml.pre")))
    if fields.get("tokenizer.ggml.model") != "gpt2" or cut is None:
        return
    content = read_json(directory / TOKENIZER, MAX_LIST_BYTES)
    write_cut(content, cut)
    write_json(directory / TOKENIZER, content)
