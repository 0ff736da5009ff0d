"""A model in this process; or, where torchrun has started several, in all of them (distributed.py).

Nothing is imported before it is needed, so that a single process starts soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eightfold.parallel.world import World

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel


@dataclass(frozen=True)
class Options:
    """How a model is loaded."""

    threads: int | None = None
    dynamic: Literal["asymmetric", "symmetric"] = "asymmetric"
    attention: Literal["cache", "mindie"] = "cache"


def load_model(checkpoint: Checkpoint, beside: Callable[[], object] | None = None, **options: Any) -> NativeModel:
    """Load a model. Of several processes rank 0 gets one that all compute, and this never returns in the others.

    They compute what rank 0 asks for until it ends, and then end too. It can be done once in a process.

    Args:
        checkpoint: any scheme.
        beside: is called while the weights are made ready, if there is one process; else before.
        options: the fields of Options; see native.load.load_model.

    Raises:
        EightfoldError: as native.load.load_model; or the processes do not fit together.
    """
    chosen, world = asdict(Options(**options)), World.of_environment()
    if world.size == 1:
        from eightfold.model.native import load as native

        return native.load_model(checkpoint, **chosen, beside=beside)
    from eightfold.engine import distributed

    if not world.is_first:
        distributed.follow(world, lambda: checkpoint, chosen)
    if beside is not None:
        beside()
    return distributed.lead(world, checkpoint, chosen)


def leave_to_first(directory: Path, **options: Any) -> None:
    """Return in rank 0 only, once it has met the others: they compute what it asks for until it ends.

    To be called before anything that only one process may do.

    Args:
        directory: of the model that rank 0 is going to load.
        options: the fields of Options.
    """
    world = World.of_environment()
    if world.size == 1:
        return
    from eightfold.engine import distributed
    from eightfold.format.checkpoint import Checkpoint

    if world.is_first:
        distributed.meet(world)
    else:
        distributed.follow(world, lambda: Checkpoint.open(directory), asdict(Options(**options)))
