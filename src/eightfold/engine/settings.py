"""What an engine is given to work with: its limits and its model.

Nothing is imported before it is needed, so that a single process starts soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eightfold.errors import ConfigError, UnsupportedError
from eightfold.parallel.world import World
from eightfold.values import BYTES, PATH, SWITCH, choice, optional, parse_size, setting, shown, whole

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.model.native.model import NativeModel


MOST_DRAFTED = 16  # by a model, at a time


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The limits of an engine, and the table from which options of the command line are made.

    Attributes:
        max_num_seqs: sequences that run at a time; others wait.
        max_model_len: positions of a sequence, prompt and answer together; None for the model's context.
        kv_memory: bytes of the key/value cache; None for half of what is free beside the weights, or what the longest
            sequences need in full number if that is less.
        max_batched_tokens: of a step: how much of a long prompt delays the next token of everybody else.
        prefix_caching: whether prompts that begin alike share keys and values.
        speculate: tokens that prompt lookup drafts at most for each sequence and step; 0: none.
        draft_model: directory of a small model with the same vocabulary, which guesses too; None for none.
        draft_tokens: that it guesses for each sequence and step; 0 for as many as pay.
        threads: how many compute; None for one a CPU.
        attention_mode: what a prompt attends over when keys and values are int8: the cache, or floats as MindIE does.
        dynamic: how W8A8_DYNAMIC quantizes a token.
        expert_parallel: whether each of several processes has whole experts, and not a part of every one.

    Raises:
        ConfigError: a value is of the wrong kind or out of its range.
    """

    max_num_seqs: int = setting(64, whole(1, 65536), "Compute at most N answers at a time; others wait.")
    max_model_len: int | None = setting(
        None, optional(whole(1)), "Most tokens of prompt and answer together. Default: the model's context."
    )
    kv_memory: int | None = setting(
        None,
        optional(BYTES),
        "Memory for keys and values, such as 2GiB. Default: as much as is needed, and at most half of the free memory.",
        metavar="SIZE",
        read=parse_size,
    )
    max_batched_tokens: int = setting(
        512, whole(1), "Most tokens of a step; with fewer, long prompts disturb running answers less."
    )
    prefix_caching: bool = setting(True, SWITCH, "Compute the common beginning of prompts only once.")
    speculate: int = setting(0, whole(0, 32), "Guess K tokens at a time from the prompt; 0 for none.", metavar="K")
    draft_model: Path | None = setting(
        None,
        optional(PATH),
        "A small model with the same vocabulary, which guesses several tokens at a time; answers stay the same.",
        metavar="DIR",
    )
    draft_tokens: int = setting(
        0,
        whole(0, MOST_DRAFTED),
        f"Guess N tokens at a time with --draft-model, at most {MOST_DRAFTED}; 0 or auto for as many as pay.",
        metavar="N|auto",
        read=lambda text: 0 if text == "auto" else int(text),
    )
    threads: int | None = setting(None, optional(whole(1)), "Number of computing threads. Default: one for each CPU.")
    attention_mode: Literal["cache", "mindie"] = setting(
        "cache",
        choice("cache", "mindie"),
        "How a prompt attends if keys and values are int8: over the cache (cache), or in float as MindIE does "
        "(mindie), which computes prompts whole.",
    )
    dynamic: Literal["asymmetric", "symmetric"] = setting(
        "asymmetric",
        choice("asymmetric", "symmetric"),
        "How w8a8-dynamic quantizes a token; the NPU does it symmetrically.",
    )
    expert_parallel: bool = setting(
        False, SWITCH, "Give each process of torchrun whole experts, and not a part of every one."
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            misfit = each.metadata["kind"].misfit(getattr(self, each.name))
            if misfit is not None:
                raise ConfigError(each.name, got=shown(misfit[0]), expected=misfit[1])
        if self.max_batched_tokens <= self.max_num_seqs:
            raise ConfigError(
                "max_batched_tokens",
                got=self.max_batched_tokens,
                expected=f"more than `max_num_seqs`, {self.max_num_seqs}",
                action="Every running sequence takes a token of a step, and prompts need some too.",
            )

        if self.draft_tokens and self.draft_model is None:
            raise ConfigError("draft_tokens", got=self.draft_tokens, expected="`draft_model` beside it")

    @property
    def computing(self) -> dict[str, Any]:
        """The options of native.load.load_model."""
        return {
            "threads": self.threads,
            "dynamic": self.dynamic,
            "attention": self.attention_mode,
            "longest": self.max_model_len,
            "expert_parallel": self.expert_parallel,
        }


def load_model(checkpoint: Checkpoint, config: EngineConfig, beside: Callable[[], object] | None = None) -> NativeModel:
    """Load a model. Of the processes that torchrun has started, only rank 0 returns; see engine/distributed.py.

    The others compute what rank 0 asks for until it ends, and then end too. It can be done once in a process.

    Args:
        checkpoint: any scheme.
        config: says how to compute.
        beside: is called while the weights are made ready, if there is one process; else before.

    Raises:
        EightfoldError: as native.load.load_model; or the processes do not fit together.
    """
    world = _world(config)
    if world.size == 1:
        from eightfold.model.native import load as native

        return native.load_model(checkpoint, **config.computing, beside=beside)
    from eightfold.engine import distributed

    if not world.is_first:
        distributed.follow(world, lambda: checkpoint, config.computing)
    if beside is not None:
        beside()
    return distributed.lead(world, checkpoint, config.computing)


def leave_to_first(directory: Path, config: EngineConfig) -> None:
    """Return in rank 0 only, once it has met the others: they compute what it asks for until it ends.

    To be called before anything that only one process may do.

    Args:
        directory: of the model that rank 0 is going to load.
        config: says how to compute.
    """
    world = _world(config)
    if world.size == 1:
        return
    from eightfold.engine import distributed
    from eightfold.format.checkpoint import Checkpoint

    if world.is_first:
        distributed.meet(world)
    else:
        distributed.follow(world, lambda: Checkpoint.open(directory), config.computing)


def _world(config: EngineConfig) -> World:
    """Return this process and the others.

    Raises:
        UnsupportedError: there are several, and a draft model, which only one process runs.
    """
    world = World.of_environment()
    if world.size > 1 and config.draft_model is not None:
        action = "Leave it out, or let prompt lookup guess: `speculate`."
        raise UnsupportedError("draft_model", got=f"{world.size} processes", expected="one", action=action)
    return world
