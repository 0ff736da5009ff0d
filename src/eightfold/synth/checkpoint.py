"""synthesize(): a random float model directory, a few pieces of a tensor in memory at a time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.config import DType, ModelConfig, parse_config
from eightfold.files import write_json
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.journal import FORMAT
from eightfold.format.output import Output
from eightfold.format.shards import PlannedTensor, ShardedWriter, total_bytes
from eightfold.progress import Progress, silent
from eightfold.synth.shapes import model_config
from eightfold.synth.tensors import RandomModel, RandomTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Larger models are published in files of this size.
SHARD_BYTES = 5_000_000_000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@dataclass(frozen=True)
class Synthesized:
    """What was made."""

    config: ModelConfig
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
        dtype: BF16 or F16.
        threads: how many compute values.
        overwrite: replace what synth has written at `target` before.
        progress: who is told.

    Raises:
        ConfigError: there is no such model, or not with so many layers.
        OutputError: the directory cannot be written, or the disk is too small.
    """
    raw = model_config(like, layers, dtype)
    config = parse_config(raw, Path(CONFIG_NAME))
    model = RandomModel(config, seed)
    tensors = list(model.tensors())
    planned = [PlannedTensor(tensor.name, dtype, tensor.shape) for tensor in tensors]
    nbytes = total_bytes(planned)
    with Output(target, {"format": FORMAT, "command": "synth"}, overwrite=overwrite) as output:
        output.require_space(nbytes)
        write_tokenizer(output.path, config, raw)
        part_bytes = SHARD_BYTES if nbytes > SHARD_BYTES else None
        writer = ShardedWriter(output.path, "model", planned, part_bytes=part_bytes, metadata={"format": "pt"})
        try:
            with progress("synthesize", len(tensors), "tensor") as task:
                for tensor, last, values in _values(model, tensors, dtype, threads):
                    task.at(tensor.name)
                    writer.append(tensor.name, values)
                    if last:
                        task.advance()
            writer.close()
        finally:
            writer.abandon()
        write_json(output.path / CONFIG_NAME, raw)
        output.finish(writer.file_checksums())
    return Synthesized(config, len(tensors), nbytes)


def _values(
    model: RandomModel, tensors: list[RandomTensor], dtype: DType, threads: int
) -> Iterator[tuple[RandomTensor, bool, NDArray[Any]]]:
    """Yield all pieces of all tensors in order, computed by threads a few pieces ahead; and whether one is the last."""
    waiting: deque[tuple[RandomTensor, bool, Future[NDArray[Any]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for tensor in tensors:
                pieces = model.pieces(tensor)
                for rows in pieces:
                    future = pool.submit(model.values, tensor, rows, dtype)
                    waiting.append((tensor, rows is pieces[-1], future))
                    if len(waiting) > 2 * threads:
                        done, is_last, values = waiting.popleft()
                        yield done, is_last, values.result()
            for done, is_last, values in waiting:
                yield done, is_last, values.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def write_tokenizer(directory: Path, config: ModelConfig, raw: dict[str, Any]) -> None:
    """Write a tokenizer without training data, and a chat template.

    It has one token for each byte, and names up to the size of the vocabulary. bos_token_id and eos_token_id are those
    of `raw`, the model's config.json; the roles stand behind them.
    """
    bos, eos = raw["bos_token_id"], raw["eos_token_id"]
    special = {bos: "<|begin_of_text|>", eos: "<|end_of_text|>"}
    special.update({max(bos, eos) + 1 + i: role for i, role in enumerate(_ROLES)})
    text = _tokenizer(config.vocab_size, special, bos).to_str(pretty=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")  # its own save() hides a full disk's errno
    settings = {
        "bos_token": special[bos],
        "eos_token": special[eos],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
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
