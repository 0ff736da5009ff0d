"""The calibration samples between two layers: one stream of hidden states, in memory or in files, and always on disk.

    generation i     what enters layer i, (T, E) float32; generation 0 is the embeddings

After a layer, the next generation is in a file of the run's work folder, exactly as it is in memory; then the layer may
count as finished, and the generation before it goes. A stream that spills keeps nothing in memory but the samples that
are on their way through the layer: it reads one generation and writes the next, by plain reads and writes, so that no
mapped page counts as this process's memory.

Letters: T tokens of all samples, E hidden size.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eightfold.format.safetensors import checksum_of
from eightfold.reference.decoder import Batch, Block, token_batches
from eightfold.reference.load import Decoder

# How many tokens, of whole samples, go through a layer at once.
BATCH_TOKENS = 2048


class HiddenStates:
    """Samples on their way through the layers of one model.

    Attributes:
        name: of the stream, and of its files.
        lengths: tokens of each sample.
        layer_idx: the layer that they enter next.
        checksum: CRC-32 of this generation's file; None of generation 0, which has none.
    """

    def __init__(
        self, name: str, decoder: Decoder, samples: Sequence[Sequence[int]], folder: Path, *, spills: bool = False
    ) -> None:
        self.name, self.lengths = name, [len(sample) for sample in samples]
        self.layer_idx = 0
        self.checksum: int | None = None
        self._decoder, self._samples, self._folder, self._spills = decoder, samples, folder, spills
        self._width = decoder.checkpoint.config.hidden_size
        self._states_TE: Tensor | None = None  # this generation, unless it lies in a file only

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
        self.layer_idx, self.checksum, self._states_TE = layer_idx, checksum, None
        self.drop_other_generations()
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of one generation."""
        return 4 * sum(self.lengths) * self._width

    def _path(self, layer_idx: int) -> Path:
        return self._folder / f"{self.name}-{layer_idx:05d}.f32"

    def _load(self) -> None:
        if self._states_TE is None and not self._spills:
            pieces = [self._read(0, sum(self.lengths), range(len(self.lengths)))]
            self._states_TE = torch.cat(pieces)

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
        """Yield a few samples at a time: their lengths, and their states one after the other, (tokens, E)."""
        self._load()
        at = 0
        for indices in token_batches(self.lengths, BATCH_TOKENS):
            sizes = [self.lengths[index] for index in indices]
            tokens = sum(sizes)
            if self._states_TE is not None:
                yield sizes, self._states_TE[at : at + tokens]
            else:
                yield sizes, self._read(at, tokens, indices)
            at += tokens

    def first_sample(self) -> Tensor:
        """Return the first sample's states, (T0, E)."""
        self._load()
        if self._states_TE is not None:
            return self._states_TE[: self.lengths[0]]
        return self._read(0, self.lengths[0], [0])

    def advance(self, block: Block) -> None:
        """Move all samples through the next layer; return when the new generation would survive a loss of power.

        The cut into batches changes no result that is not also changed by a matrix library's own blocking: samples
        never see each other.
        """
        inv_freq = self._decoder.inv_freq
        file = os.open(self._path(self.layer_idx + 1), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        checksum = at = 0
        try:
            for sizes, piece in self.pieces():
                states = block(piece, Batch.of(sizes, inv_freq))
                if self._states_TE is not None:
                    piece.copy_(states)
                data = states.cpu().contiguous().numpy().data.cast("B")
                checksum = zlib.crc32(data, checksum)
                while data:
                    written = os.pwrite(file, data, at)
                    data, at = data[written:], at + written
            os.fdatasync(file)
        finally:
            os.close(file)
        self.layer_idx, self.checksum = self.layer_idx + 1, checksum

    def drop_other_generations(self) -> None:
        """Remove the files of every generation but this one."""
        for path in self._folder.glob(f"{self.name}-*.f32"):
            if path != self._path(self.layer_idx):
                path.unlink()
