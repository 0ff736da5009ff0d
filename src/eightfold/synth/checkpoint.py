"""synthesize(): a random float model directory, a few pieces of a tensor in memory at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.config import DType, ModelConfig, parse_config
from eightfold.format.checkpoint import CONFIG_NAME
from eightfold.format.journal import FORMAT
from eightfold.format.output import Output, write_json
from eightfold.format.safetensors import PlannedTensor
from eightfold.format.writer import ShardedWriter, total_bytes
from eightfold.progress import Progress, silent
from eightfold.synth.shapes import model_config
from eightfold.synth.tensors import RandomModel, RandomTensor
from eightfold.synth.vocabulary import write_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Larger models are published in files of this size.
SHARD_BYTES = 5_000_000_000


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
        overwrite: replace an existing model directory at `target`.
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
