"""The calibration samples between two layers: one stream of hidden states, in memory or in files, and always on disk.

    generation i     what enters layer i, (T, E) float32; generation 0 is the embeddings

After a layer, the next generation goes to a file of the run's work folder, exactly as it is in memory, while work goes
on; when it is on the disk the layer may count as finished. Three files take turns: writing over one that is there takes
half the time of a new one, and while one rank already writes generation i + 1, generation i may not be journalled yet,
so that a new start would need i - 1.

A stream that spills keeps nothing in memory but the samples that are on their way through the layer: it reads one
generation and writes the next, by plain reads and writes, so that no mapped page counts as this process's memory.

Of several processes each moves its own batches (team.py), and writes them where they belong in the one file; none but
rank 0 ever reads another's, and that when all layers are finished.

Letters: T tokens of all samples, E hidden size.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.families import input_groups
from eightfold.format.pagecache import drop
from eightfold.format.safetensors import checksum_of, joined_checksum
from eightfold.model.reference.decoder import Batch, Block, token_batches
from eightfold.model.reference.load import Decoder
from eightfold.quant.settling import Settling
from eightfold.quant.team import Alone, Round, Team, in_batch_order, turns

# How many a stream has on disk.
GENERATIONS = 3

# How many tokens, of whole samples, go through a layer at once, at most.
BATCH_TOKENS = 2048

# Batches come in a multiple of this number, so that as many ranks have as much to do, unless they became so small.
_EVEN, _FEW_TOKENS = 8, 256

# A product of attention takes as long as so many of a linear: small matrices, and softmax between them.
_ATTENTION_COST = 5


class HiddenStates:
    """Samples on their way through the layers of one model.

    Attributes:
        name: of the stream, and of its files.
        lengths: tokens of each sample.
        turns: which ranks take the batches of each round, see team.turns.
        layer_idx: the layer that they enter next.
        checksum: CRC-32 of this generation's file, in rank 0 and once it is finished; generation 0 has none.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        samples: Sequence[Sequence[int]],
        folder: Path,
        settling: Settling,
        *,
        spills: bool = False,
        team: Team | None = None,
        first_rank: int = 0,
    ) -> None:
        """Start where the samples are.

        Args:
            name: of the stream.
            decoder: the model.
            samples: token ids of each.
            folder: where files go.
            settling: what brings them to the disk.
            spills: keep nothing in memory.
            team: the processes among which the samples are shared; None for this one alone.
            first_rank: who takes the first batch; another one than rank 0 only where there is no other batch.
        """
        self.name, self.lengths = name, [len(sample) for sample in samples]
        self.layer_idx = 0
        self.checksum: int | None = None
        self._decoder, self._samples, self._folder, self._spills = decoder, samples, folder, spills
        self._team = team or Alone()
        self._width = decoder.checkpoint.config.hidden_size
        self._settling = settling
        self._batches = sample_batches(self.lengths)
        costs = [_cost(decoder.checkpoint.config, self._sizes(batch)) for batch in range(len(self._batches))]
        self.turns = turns(costs, self._team.size)
        if first_rank:
            assert len(self._batches) == 1
            self.turns = [[first_rank]]
        self._written: list[int] = []  # CRC-32 of each batch that this rank has written of this generation
        self._begins = [0, *itertools.accumulate(self.lengths)]  # of each sample, in tokens
        self._held: dict[int, Tensor] = {}  # of this generation, this rank's batches, unless they lie in a file only

    def resume(self, layer_idx: int, checksum: int) -> bool:
        """Go on with what an earlier run has left; return whether it is intact."""
        try:
            file = os.open(self._path(layer_idx), os.O_RDONLY)
        except OSError:
            return False
        try:
            size = os.fstat(file).st_size
            if size != self.nbytes or checksum_of(file, 0, size) != checksum:
                return False
        finally:
            os.close(file)
        self.go_on_from(layer_idx, checksum)
        return True

    def go_on_from(self, layer_idx: int, checksum: int) -> None:
        """Go on with a generation that somebody has found intact."""
        self.layer_idx, self.checksum, self._held = layer_idx, checksum, {}

    @property
    def nbytes(self) -> int:
        """Bytes of one generation."""
        return 4 * sum(self.lengths) * self._width

    @property
    def disk_bytes(self) -> int:
        """Bytes that its files still need, beside those they have."""
        return sum(max(0, self.nbytes - _allocated(self._path(i))) for i in range(GENERATIONS))

    def _path(self, layer_idx: int) -> Path:
        return self._folder / f"{self.name}-{layer_idx % GENERATIONS}.f32"

    def _sizes(self, batch: int) -> list[int]:
        return [self.lengths[index] for index in self._batches[batch]]

    def _first_token(self, batch: int) -> int:
        return self._begins[self._batches[batch][0]]

    def _piece(self, batch: int) -> Tensor:
        """Return the states of one batch, (tokens, E)."""
        if batch in self._held:
            return self._held[batch]
        return self._read(self._first_token(batch), sum(self._sizes(batch)), self._batches[batch])

    def _read(self, at: int, tokens: int, indices: Sequence[int]) -> Tensor:
        """Return (tokens, E) from token `at` on, which are these samples', from the table or the file."""
        if self.layer_idx == 0:
            return self._decoder.embed([token for index in indices for token in self._samples[index]])
        states = torch.empty(tokens, self._width, dtype=torch.float32, device="cpu")
        buffer = states.numpy().data.cast("B")
        file = os.open(self._path(self.layer_idx), os.O_RDONLY)
        try:
            begin = 4 * self._width * at
            while buffer:
                count = os.preadv(file, [buffer], begin)
                assert count, f"{self._path(self.layer_idx)} ends early"
                buffer, begin = buffer[count:], begin + count
        finally:
            os.close(file)
        return states.to(torch.get_default_device())

    def pieces(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield all samples, a few at a time: their lengths, and their states one after the other, (tokens, E)."""
        for batch in range(len(self._batches)):
            yield self._sizes(batch), self._piece(batch)

    def first_sample(self) -> Tensor:
        """Return the first sample's states, (T0, E)."""
        if 0 in self._held:
            return self._held[0][: self.lengths[0]]
        return self._read(0, self.lengths[0], [0])

    def advance(self, block: Block) -> None:
        """Move all samples through the next layer, and begin to bring the new generation to the disk.

        The cut into batches changes no result that is not also changed by a matrix library's own blocking: samples
        never see each other.
        """
        has_batches = any(self._team.rank in order for order in self.turns)
        file = self._open_next() if has_batches else -1
        try:
            self._written = self._move(block, file)
        except BaseException:
            if has_batches:
                os.close(file)
            raise
        if has_batches:
            self._settling.sync(file)
        self.layer_idx, self.checksum = self.layer_idx + 1, None

    def _open_next(self) -> int:
        file = os.open(self._path(self.layer_idx + 1), os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(file, self.nbytes)  # not to nothing: another rank may have begun to write
        if not self._team.is_one_host:
            # A file system of several hosts may write a page that it has read as a whole, others' new bytes with it.
            drop(file, 0, self.nbytes)
        return file

    def finish(self) -> None:
        """Tell rank 0 that what this rank has written of a generation is on the disk, as `settling` has found."""
        written = self._team.collect_first(self._written)
        if self._team.is_first:
            self.checksum = self._joined(written)

    def _move(self, block: Block, file: int) -> list[int]:
        """Move this rank's batches; return the CRC-32 of each as it is in the file."""
        inv_freq, team, checksums = self._decoder.inv_freq, self._team, []
        try:
            for number, order in enumerate(self.turns):
                at = order.index(team.rank) if team.rank in order else len(order) - 1
                batch = number * team.size + at
                team.round = self._round(order, batch, at)
                if team.rank not in order:
                    stay_away(block)
                    continue
                states = block(self._piece(batch), Batch.of(self._sizes(batch), inv_freq))
                if not self._spills:
                    self._held[batch] = states
                checksums.append(_write(file, states, 4 * self._width * self._first_token(batch)))
        finally:
            team.round = None
        return checksums

    def _round(self, order: Sequence[int], batch: int, at: int) -> Round:
        counts = [0] * self._team.size
        for place, rank in enumerate(order):
            counts[rank] = len(self._batches[batch - at + place])
        return Round(tuple(counts), tuple(order), self._batches[batch][0], self._first_token(batch))

    def _joined(self, checksums: Sequence[Sequence[int]]) -> int:
        """Return the CRC-32 of the whole file from those of the batches that each rank has written."""
        whole = 0
        for batch, checksum in enumerate(in_batch_order(checksums, self.turns)):
            whole = joined_checksum(whole, checksum, 4 * self._width * sum(self._sizes(batch)))
        return whole


def sample_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Cut samples (by index) into batches of nearly the same number of tokens, the same for any number of ranks."""
    total = sum(lengths)
    least = -(-total // BATCH_TOKENS)
    count = -(-least // _EVEN) * _EVEN
    while count > max(least, 1) and total < count * _FEW_TOKENS:
        count //= 2
    batches: dict[int, list[int]] = {}
    for index, (length, end) in enumerate(zip(lengths, itertools.accumulate(lengths), strict=True)):
        batches.setdefault((2 * end - length) * max(count, least) // (2 * total), []).append(index)
    even = _evened(list(batches.values()), lengths)
    return [
        [batch[at] for at in part]
        for batch in even
        for part in token_batches([lengths[index] for index in batch], BATCH_TOKENS)
    ]


def _evened(batches: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Move samples across the ends of batches as long as that brings two neighbours closer."""
    tokens = [sum(lengths[index] for index in batch) for batch in batches]
    left = list(range(1, len(batches)))  # ends to look at
    while left:
        after = left.pop()
        before = after - 1
        if 0 < lengths[batches[before][-1]] < tokens[before] - tokens[after]:
            moved = batches[before].pop()
            batches[after].insert(0, moved)
        elif 0 < lengths[batches[after][0]] < tokens[after] - tokens[before]:
            moved = batches[after].pop(0)
            batches[before].append(moved)
        else:
            continue
        tokens[before], tokens[after] = (sum(lengths[i] for i in batches[at]) for at in (before, after))
        left += [end for end in (before, after + 1, after) if 0 < end < len(batches)]
    return batches


def _cost(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Return how much there is to do for samples in a layer, in products of its linears."""
    linears = sum(linear.n * linear.k for group in input_groups(config) for linear in group.linears)
    attention = 2 * config.q_size * _ATTENTION_COST
    return sum(length * linears + length * length * attention for length in lengths)


def stay_away(block: Block) -> None:
    """Take part in what the observers of a layer exchange, without a sample."""
    for group in (block.qkv, block.o, block.gate_up, block.down):
        if isinstance(group, Exchanging):
            group.stay_away()


@runtime_checkable
class Exchanging(Protocol):
    """A group of linears that all ranks have to call in each round."""

    def stay_away(self) -> None:
        """Take part without samples."""
        ...


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
