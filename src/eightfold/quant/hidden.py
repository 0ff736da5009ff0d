"""The calibration samples between two layers: one stream of hidden states, in memory or in files, and always on disk.

    generation i     what enters layer i, (T, E) float32; generation 0 is the embeddings

After a layer, the next generation goes to a file of the run's work folder, exactly as it is in memory, while work goes
on; when it is on the disk the layer may count as finished. Three files take turns: writing over one that is there takes
half the time of a new one, and while another rank already writes generation i + 1, generation i may not be journalled
yet, so that a new start would need i - 1.

A stream that spills keeps nothing in memory but the samples that are on their way through the layer: it reads one
generation and writes the next, by plain reads and writes, so that no mapped page counts as this process's memory.

Each of W ranks moves every W-th batch, and writes it to its place in the one file; none but rank 0 ever reads another
one's, and that when all layers are finished.

Letters: T tokens of all samples, E hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eightfold.format.safetensors import checksum_of, checksum_of_parts
from eightfold.model.reference.decoder import Batch, Block, token_batches
from eightfold.model.reference.load import Decoder
from eightfold.parallel.ranks import Ranks, in_turn
from eightfold.quant.calibrate import Observer
from eightfold.quant.statistics import require_finite_samples

# How many a stream has on disk.
GENERATIONS = 3

# How many tokens, of whole samples, go through a layer at once, at most.
BATCH_TOKENS = 2048

# Batches come in a multiple of this number, so that as many ranks have as much to do, unless they became so small.
_EVEN, _FEW_TOKENS = 8, 256


class BackgroundSync:
    """A thread that brings files to the disk while work goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eightfold-sync")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> BackgroundSync:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def sync(self, file: int) -> None:
        self._begun.append(self._thread.submit(_sync_and_close, file))

    def wait(self) -> None:
        """Return when all files are on the disk.

        Raises:
            OSError: one could not be written.
        """
        while self._begun:
            self._begun.pop(0).result()


def _sync_and_close(file: int) -> None:
    try:
        os.fdatasync(file)
    finally:
        with contextlib.suppress(OSError):
            os.close(file)


class HiddenStates:
    """Samples on their way through the layers of one model.

    Attributes:
        name: of the stream, and of its files.
        lengths: tokens of each sample.
        layer_idx: the layer that they enter next.
        checksum: CRC-32 of this generation's file, in rank 0 and once it is finished; generation 0 has none.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        samples: Sequence[Sequence[int]],
        folder: Path,
        sync: BackgroundSync,
        *,
        spills: bool = False,
        ranks: Ranks | None = None,
        generations: int = GENERATIONS,
    ) -> None:
        """Start where the samples are.

        Args:
            name: of the stream, and of its files.
            decoder: the model.
            samples: token ids of each.
            folder: where files go.
            sync: brings them to the disk.
            spills: keep nothing in memory.
            ranks: the processes among which the samples are shared; None for this one alone.
            generations: how many to keep on disk; of as many as there are, all stay.
        """
        self._generations = generations
        self.name, self.lengths = name, [len(sample) for sample in samples]
        self.layer_idx = 0
        self.checksum: int | None = None
        self._decoder, self._samples, self._folder, self._spills = decoder, samples, folder, spills
        self._sync, self._ranks = sync, ranks or Ranks()
        self._width = decoder.checkpoint.config.hidden_size
        self._batches = sample_batches(self.lengths)
        self._round = 0  # the first of the batches that the ranks move at this time
        self._checksums: list[int] = []  # of each batch that this rank has moved into this generation
        self._begins = [0, *itertools.accumulate(self.lengths)]  # of each sample, in tokens
        self._held: dict[int, Tensor] = {}  # of this generation, this rank's batches, unless they lie in a file only

    def resume(self, layer_idx: int, checksum: int) -> bool:
        """Go on with what an earlier run has left; return whether rank 0 finds it intact."""
        self.layer_idx, self.checksum, self._held = layer_idx, checksum, {}
        if not self._ranks.is_first:
            return True
        try:
            file = os.open(self._path(layer_idx), os.O_RDONLY)
        except OSError:
            return False
        try:
            if os.fstat(file).st_size != self.nbytes:
                return False
            return checksum_of_parts(checksum_of(file, *self._span(batch)) for batch in self._batches) == checksum
        finally:
            os.close(file)

    @property
    def nbytes(self) -> int:
        return 4 * sum(self.lengths) * self._width

    @property
    def disk_bytes(self) -> int:
        """Bytes that its files still need, beside those they have."""
        return sum(max(0, self.nbytes - _allocated(self._path(i))) for i in range(self._generations))

    def _path(self, layer_idx: int) -> Path:
        return self._folder / f"{self.name}-{layer_idx % self._generations}.f32"

    def _span(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return where in a file the bytes of consecutive samples begin and end."""
        return 4 * self._width * self._begins[indices[0]], 4 * self._width * self._begins[indices[-1] + 1]

    def _sizes(self, batch: int) -> list[int]:
        return [self.lengths[index] for index in self._batches[batch]]

    def _states(self, batch: int) -> Tensor:
        """Return the states of one batch, (tokens, E): as they are held, from the embedding table or from the file."""
        if batch in self._held:
            return self._held[batch]
        indices = self._batches[batch]
        if self.layer_idx == 0:
            return self._decoder.embed([token for index in indices for token in self._samples[index]])
        path, count = self._path(self.layer_idx), self._width * sum(self._sizes(batch))
        states = np.fromfile(path, np.float32, count, offset=self._span(indices)[0])
        return torch.from_numpy(states).reshape(-1, self._width).to(torch.get_default_device())

    def pieces(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield all samples, a few at a time: their lengths, and their states one after the other, (tokens, E)."""
        for batch in range(len(self._batches)):
            yield self._sizes(batch), self._states(batch)

    def batches(self, layer_idx: int) -> Iterator[tuple[slice, Batch, Tensor]]:
        """Yield what entered a layer whose generation is kept: the tokens among all, their batch, and states (T, E)."""
        self.layer_idx, self._held = layer_idx, {}
        for batch, indices in enumerate(self._batches):
            tokens = slice(self._begins[indices[0]], self._begins[indices[-1] + 1])
            yield tokens, Batch.of(self._sizes(batch), self._decoder.turns()), self._states(batch)

    def first_sample(self) -> Tensor:
        """Return the first sample's states, (T0, E), in rank 0."""
        return self._states(0)[: self.lengths[0]]

    def advance(self, block: Block, observers: Sequence[Observer] = ()) -> None:
        """Move this rank's samples through the next layer, and begin to bring the new generation to the disk.

        The cut into batches changes no result that is not also changed by a matrix library's own blocking: samples
        never see each other.

        Args:
            block: the layer.
            observers: of its inputs, in order; those that use `in_order`.
        """
        self._checksums = []
        file = os.open(self._path(self.layer_idx + 1), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(file, self.nbytes)  # not to nothing: another rank may have begun to write
            for first in range(0, len(self._batches), self._ranks.size):
                self._round, batch = first, first + self._ranks.rank
                if batch < len(self._batches):
                    self._move(batch, block, file)
                else:
                    for observer in observers:
                        observer.update(torch.zeros(0, 1), [])
        except BaseException:
            os.close(file)
            raise
        self._sync.sync(file)
        self.layer_idx, self.checksum = self.layer_idx + 1, None

    def _move(self, batch: int, block: Block, file: int) -> None:
        work = Batch.of(self._sizes(batch), self._decoder.turns())
        states = block(self._states(batch), work)
        if not torch.isfinite(states.sum()):  # or it overflows
            ends = [torch.stack(torch.aminmax(states[begin:end])) for begin, end in work.spans]
            following, config = self.layer_idx + 1, self._decoder.checkpoint.config
            is_last = following == config.num_layers
            title = "the final norm" if is_last else config.names.layer(following).removesuffix(".")
            require_finite_samples(title, self._batches[batch][0], *torch.stack(ends).unbind(1))
        if not self._spills:
            self._held[batch] = states
        at, _ = self._span(self._batches[batch])
        self._checksums.append(_write(file, states, at))

    def place(self) -> tuple[int, int]:
        """Return which sample and which token, among all, are the first of the batch that this rank moves."""
        sample = self._batches[self._round + self._ranks.rank][0]
        return sample, self._begins[sample]

    def in_order(self, part: Tensor) -> tuple[Tensor, int]:
        """Put together what each rank has found of its samples in this round; see statistics.InOrder."""
        if self._ranks.size == 1:
            return part, 0
        counts = [len(batch) for batch in self._batches[self._round :][: self._ranks.size]]
        counts += [0] * (self._ranks.size - len(counts))
        return self._ranks.concatenated(part, counts), sum(counts[: self._ranks.rank])

    def finish(self) -> None:
        """Tell rank 0 what this rank has written of a generation, which is on the disk."""
        checksums = in_turn(self._ranks.gather(self._checksums))
        if self._ranks.is_first:
            self.checksum = checksum_of_parts(checksums)


def sample_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Cut samples (by index) into batches of about the same number of tokens, the same for any number of ranks."""
    total = sum(lengths)
    least = -(-total // BATCH_TOKENS)
    count = -(-least // _EVEN) * _EVEN
    while count > max(least, 1) and total < count * _FEW_TOKENS:
        count //= 2
    batches: dict[int, list[int]] = {}
    for index, (length, end) in enumerate(zip(lengths, itertools.accumulate(lengths), strict=True)):
        batches.setdefault((2 * end - length) * max(count, least) // (2 * total), []).append(index)
    return [
        [batch[at] for at in part]
        for batch in batches.values()
        for part in token_batches([lengths[index] for index in batch], BATCH_TOKENS)
    ]


def _allocated(path: Path) -> int:
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _write(file: int, states: Tensor, at: int) -> int:
    """Write states at an offset of a file; return the CRC-32 of their bytes."""
    data = states.cpu().contiguous().numpy().data.cast("B")
    checksum = zlib.crc32(data)
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
    return checksum
