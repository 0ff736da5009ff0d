"""synthesize(): a random float model that behaves like one: hidden states stay finite, a few channels stand out.

    x   hidden states: deviation 0.02 after the embedding, about 1 after all layers, LOUD times that in some channels
    n = x / rms(x) * g      g = 1 +- 0.1; in those channels o / LOUD, so that n is there o times what it is elsewhere,
                            o between 20 and 100: what int8 activations suffer from
    q, k, v, gate, up       deviation K**-0.5, and o**-0.5 times that in the columns that read such a channel;
                            routers of experts too
    o, down                 deviation (2 L K)**-0.5, LOUD times that in the rows that write one
    up (not of experts)     a few rows SPIKE times as large: the outlier channels of down's input

A branch so adds a variance of about 1 / (2 L), and the stream grows over the layers as a trained model's does.

A value is one of 65,536 quantiles of a normal distribution, picked by 16 random bits: a look-up, and no arithmetic.
Each piece of rows has its own generator, so that values do not depend on who computes which piece.

Letters: E hidden size, K inputs, L layers, V vocabulary.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eightfold.config import DType, ModelConfig, has_engine, parse_config
from eightfold.families import (
    ExpertBlock,
    InputGroup,
    LinearShape,
    expert_block,
    input_groups,
    layer_norms,
    smooth_pairs,
)
from eightfold.files import write_json
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import FORMAT
from eightfold.format.output import Output
from eightfold.format.shards import ShardedWriter, total_bytes
from eightfold.layouts import layer_count, text_config
from eightfold.progress import Progress, silent
from eightfold.scheme import bias_name, weight_name
from eightfold.synth.named import NamedModel
from eightfold.synth.shapes import model_config
from eightfold.synth.tensors import RandomTensor, RandomValues

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Larger models are published in files of this size.
SHARD_BYTES = 5_000_000_000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

EMBEDDING_STD, BIAS_STD, GAIN_STD = 0.02, 0.5, 0.1
LOUD, SPIKE = 6.0, 10.0
OUTLIERS = (20.0, 100.0)


class RandomModel(RandomValues):
    """All tensors of a model that this program runs; what they hold follows from its configuration and a seed."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__(seed)
        self._config = config
        # The norm that a group of linears reads.
        self._norm_of = {pair.group: pair.source for pair in smooth_pairs(config) if pair.source_is_norm}
        self._loud = self._channels(config.hidden_size, "hidden states")

    def _channels(self, size: int, what: str) -> list[int]:
        """Return the channels of `size` that stand out: one in 512, at least two."""
        return sorted(self._generator(what).choice(size, max(2, size // 512), replace=False).tolist())

    def tensors(self) -> Iterator[RandomTensor]:
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        loud = dict.fromkeys(self._loud, LOUD)
        yield RandomTensor(weight_name(config.names.embedding), shape, EMBEDDING_STD, columns=loud)
        for layer_idx in range(config.num_layers):
            yield from self._layer(layer_idx)
        yield RandomTensor(weight_name(config.names.final_norm), (config.hidden_size,), GAIN_STD, mean=1.0)
        if not config.tie_word_embeddings:
            yield RandomTensor(weight_name(config.names.head), shape, config.hidden_size**-0.5)

    def _layer(self, layer_idx: int) -> Iterator[RandomTensor]:
        prefix = self._config.names.layer(layer_idx)
        outliers = {name: self._outliers(prefix + name) for name in self._norm_of.values()}
        for name, size in layer_norms(self._config).items():
            gains = {channel: outlier / LOUD for channel, outlier in outliers.get(name, {}).items()}
            yield RandomTensor(weight_name(prefix + name), (size,), GAIN_STD, mean=1.0, columns=gains)
        block = expert_block(self._config, layer_idx)
        for group in (*input_groups(self._config, layer_idx), *(() if block is None else _expert_groups(block))):
            read = outliers.get(self._norm_of.get(group.title, ""), {})
            for linear in group.linears:
                yield self._weight(prefix, group, linear, read)
                if linear.has_bias:
                    yield RandomTensor(bias_name(prefix + linear.name), (linear.n,), BIAS_STD)

    def _outliers(self, norm: str) -> dict[int, float]:
        """Return how far each outlier channel behind a norm stands out; evenly spread on a logarithmic scale."""
        lo, hi = np.log(OUTLIERS)
        found = np.exp(self._generator(norm).uniform(lo, hi, len(self._loud)))
        return dict(zip(self._loud, found.tolist(), strict=True))

    def _weight(self, prefix: str, group: InputGroup, linear: LinearShape, read: Mapping[int, float]) -> RandomTensor:
        config, name, std = self._config, weight_name(prefix + linear.name), float(linear.k**-0.5)
        if group.title not in self._norm_of:  # it writes hidden states
            std *= (2 * config.num_layers) ** -0.5
            return RandomTensor(name, (linear.n, linear.k), std, rows=dict.fromkeys(self._loud, LOUD))
        spikes = self._channels(linear.n, name) if linear.name == config.names.gate_up[-1] else []
        columns = {channel: outlier**-0.5 for channel, outlier in read.items()}
        return RandomTensor(name, (linear.n, linear.k), std, rows=dict.fromkeys(spikes, SPIKE), columns=columns)


def _expert_groups(block: ExpertBlock) -> Iterator[InputGroup]:
    """Yield the linears of experts one after the other, as what they are: those that read the norm, and the others."""
    writes = {expert.down.name for expert in (*block.experts, *filter(None, [block.shared]))}
    for linear in block.linears:
        yield InputGroup("down" if linear.name in writes else "gate_up", (linear,))


@dataclass(frozen=True)
class Synthesized:
    """What was made."""

    layers: int
    tensors: int
    nbytes: int  # of tensor data


def synthesize(
    like: str,
    target: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: DType = DType.BF16,
    threads: int = 2,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Synthesized:
    """Make a random float model.

    Args:
        like: the model whose shapes it has, one of shapes.MODELS.
        target: the directory to make; it appears when everything is written.
        layers: how many; None for as many as that model has.
        seed: not negative. The same seed gives the same bytes, whatever the number of threads.
        dtype: BF16 or F16; what a family is published with in float8 is float8 all the same.
        threads: how many compute values.
        overwrite: replace what synth has written at `target` before.
        progress: who is told.

    Raises:
        ConfigError: there is no such model, or not with so many layers.
        OutputError: the directory cannot be written, or the disk is too small.
    """
    raw = model_config(like, layers, dtype)
    runs_here = has_engine(raw)
    model = RandomModel(parse_config(raw, Path(CONFIG_NAME)), seed) if runs_here else NamedModel(raw, seed)
    tensors = list(model.tensors())
    planned = [tensor.planned(dtype) for tensor in tensors]
    nbytes = total_bytes(planned)
    with Output(target, {"format": FORMAT, "command": "synth"}, overwrite=overwrite) as output:
        output.require_space(nbytes)
        write_tokenizer(output.path, text_config(raw))
        part_bytes = SHARD_BYTES if nbytes > SHARD_BYTES else None
        with (
            ShardedWriter(output.path, "model", planned, part_bytes=part_bytes, metadata={"format": "pt"}) as writer,
            progress("synthesize", len(tensors), "tensor") as task,
        ):
            for tensor, last, values in _values(model, tensors, dtype, threads):
                task.at(tensor.name)
                writer.append(tensor.name, values)
                if last:
                    task.advance()
        write_json(output.path / CONFIG_NAME, raw)
        output.finish(writer.file_checksums())
    return Synthesized(layer_count(raw, Path(CONFIG_NAME)), len(tensors), nbytes)


def _values(
    model: RandomValues, tensors: list[RandomTensor], dtype: DType, threads: int
) -> Iterator[tuple[RandomTensor, bool, NDArray[Any]]]:
    """Yield all pieces of all tensors in order, computed by threads a few pieces ahead; and whether one is the last."""
    waiting: deque[tuple[RandomTensor, bool, Future[NDArray[Any]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for tensor in tensors:
                pieces = model.pieces(tensor)
                for rows in pieces:
                    future = pool.submit(model.values, tensor, rows, tensor.dtype or dtype)
                    waiting.append((tensor, rows is pieces[-1], future))
                    if len(waiting) > 2 * threads:
                        done, is_last, values = waiting.popleft()
                        yield done, is_last, values.result()
            for done, is_last, values in waiting:
                yield done, is_last, values.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def write_tokenizer(directory: Path, raw: Mapping[str, Any]) -> None:
    """Write a tokenizer without training data, and a chat template.

    It has one token for each byte, and names up to the size of the vocabulary. bos_token_id and eos_token_id are those
    of `raw`, the model's config.json; the roles stand behind them.
    """
    bos, eos = raw["bos_token_id"], raw["eos_token_id"]
    special = {bos: "<|begin_of_text|>", eos: "<|end_of_text|>"}
    special.update({max(bos, eos) + 1 + i: role for i, role in enumerate(_ROLES)})
    text = _tokenizer(raw["vocab_size"], special, bos).to_str(pretty=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")  # its own save() hides a full disk's errno
    settings = {
        "bos_token": special[bos],
        "eos_token": special[eos],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": raw["max_position_embeddings"],
    }
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _tokenizer(size: int, special: dict[int, str], bos: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    bytes_first = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [special.get(i) or (bytes_first[i] if i < 256 else f"<|unused_{i}|>") for i in range(size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[bos]} $A", special_tokens=[(special[bos], bos)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
