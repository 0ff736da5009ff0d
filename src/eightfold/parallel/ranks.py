"""The processes that quantize one model together, over the collectives of torch.distributed (gloo).

All ranks walk through the same layers. Of W ranks, rank r moves the batches r, r + W, r + 2 W, ... of the samples; what
is found of samples is put together in their order, so that every rank sees what one process would see. Rank 0 has the
output and talks to the user.

A rank that fails leaves its error in torchrun's store; of one that dies the connections close. Either ends what the
others wait for, and so the others: rank 0 with one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from eightfold import errors
from eightfold.errors import ConfigError, EightfoldError, PeerError, one_of
from eightfold.parallel.gloo import start_gloo
from eightfold.parallel.link import EXIT_LOST, process_name
from eightfold.parallel.world import World, require_alike

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# For any wait: rank 0 may have to read an output of many GB again before it begins.
_WAIT_SECONDS = 1800.0

_ERROR_KEY = "eightfold-error"

_START = "Start them with torchrun --nproc_per_node N -m eightfold quantize ..."
_SAME_BITS = (
    "Use hosts with the same kind of CPU and the same environment, or start all ranks with "
    "ATEN_CPU_CAPABILITY=avx2 and MKL_CBWR=AVX2."
)
ADVICE = {
    "eightfold": "Install the same version on all hosts.",
    "torch": "Install the same version on all hosts.",
    "source": "Let all ranks see the same model directory.",
    "instruction set": _SAME_BITS,
    "float32 arithmetic": _SAME_BITS,
}


class Ranks:
    """The processes, seen from one of them; by default this one alone, which exchanges nothing."""

    def __init__(self, world: World | None = None) -> None:
        """Meet the others.

        Raises:
            ConfigError: they are not there in time.
        """
        world = world or World()
        self.rank, self.size, self.is_first = world.rank, world.size, world.is_first
        self._others = ["another rank"]  # what messages call them
        if world.size == 1:
            return
        try:
            self._store = start_gloo(world, _WAIT_SECONDS)
        except (RuntimeError, ValueError, OSError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError("the ranks do not find each other", got=text, action=_START) from None
        self._take_signals()

    def _take_signals(self) -> None:
        """Let rank 0 decide when to end; to it, SIGTERM may be the launcher's answer to the error of another rank."""
        if not self.is_first:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        elif callable(before := signal.getsignal(signal.SIGTERM)):

            def terminated(number: int, frame: FrameType | None) -> None:
                if self._store.check([_ERROR_KEY]):
                    raise self._reason()
                before(number, frame)

            signal.signal(signal.SIGTERM, terminated)

    def require_alike(self, facts: Mapping[str, Any]) -> None:
        expected = json.loads(json.dumps(facts))
        names, found = zip(*self.gather((process_name(), expected)), strict=True)
        if self.is_first and self.size > 1:
            self._others = [f"rank {rank} ({name})" for rank, name in enumerate(names)][1:]
            require_alike(expected, zip(self._others, found[1:], strict=True), ADVICE)

    def share(self, value: T) -> T:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self._together():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order, in rank 0; in the others their own."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._together():
            dist.gather_object(packed(value), values)
        return [value, *(pickle.loads(found) for found in (values or [])[1:])]

    def concatenated(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the parts of all ranks one after the other; rank r's is (counts[r], ...)."""
        import torch
        import torch.distributed as dist

        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        with self._together():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def end(self) -> None:
        """Part: all is done."""
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.barrier()
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Let the others end too. Rank 0 tells the user; another rank has rank 0 tell, and ends here."""
        if self.size == 1:
            return
        if not self.is_first:
            with contextlib.suppress(RuntimeError):  # rank 0 has ended
                text = f"rank {self.rank} ({process_name()}): {str(error) or type(error).__name__}"
                self._store.set(_ERROR_KEY, json.dumps({"kind": type(error).__name__, "text": text}))
            os._exit(EXIT_LOST)
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for the others; if one is gone, say so in rank 0, and end another rank."""
        try:
            yield
        except RuntimeError:
            if not self.is_first:
                os._exit(EXIT_LOST)  # rank 0 tells the user, or if it was killed the launcher
            raise self._reason() from None

    def _reason(self) -> EightfoldError:
        if not self._store.check([_ERROR_KEY]):
            got = "no sign of life: it has died or cannot be reached"
            return PeerError(one_of(self._others), got=got, action="So all others end.")
        words = json.loads(self._store.get(_ERROR_KEY))
        kind = getattr(errors, words["kind"], PeerError)
        is_ours = isinstance(kind, type) and issubclass(kind, EightfoldError)
        error: EightfoldError = (kind if is_ours else PeerError)(words["text"])
        return error


def packed(value: Any) -> bytes:
    """Return a value pickled, its tensors as arrays: torch takes ten times as long for the many small ones."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, found: Any) -> Any:
            if type(found) is torch.Tensor and found.device.type == "cpu" and found.dtype != torch.bfloat16:
                return torch.from_numpy, (found.numpy(),)
            return NotImplemented

    content = io.BytesIO()
    Pickler(content, pickle.HIGHEST_PROTOCOL).dump(value)
    return content.getvalue()


def in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return what each rank has of its batches, one thing for each, in the order of the batches."""
    return [part[at] for at in range(len(parts[0])) for part in parts if at < len(part)]
