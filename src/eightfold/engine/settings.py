"""What an engine is given to work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eightfold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The limits of an engine.

    Attributes:
        max_num_seqs: sequences that run at a time; others wait.
        max_model_len: positions of a sequence, prompt and answer together; None for the model's context.
        kv_memory: bytes of the key/value cache; None for half of what is free beside the weights, or what the longest
            sequences need in full number if that is less.
        max_batched_tokens: of a step: how much of a long prompt delays the next token of everybody else.
        prefix_caching: whether prompts that begin alike share keys and values.
        speculate: tokens that prompt lookup drafts at most for each sequence and step; 0: none.
        threads: how many compute; None for one a CPU.
        attention_mode: what a prompt attends over when keys and values are int8: the cache, or floats as MindIE does.
        dynamic: how W8A8_DYNAMIC quantizes a token.

    Raises:
        ConfigError: a number is out of range.
    """

    max_num_seqs: int = 64
    max_model_len: int | None = None
    kv_memory: int | None = None
    max_batched_tokens: int = 512
    prefix_caching: bool = True
    speculate: int = 0
    threads: int | None = None
    attention_mode: Literal["cache", "mindie"] = "cache"
    dynamic: Literal["asymmetric", "symmetric"] = "asymmetric"

    def __post_init__(self) -> None:
        for name, value in (
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-model-len", self.max_model_len),
            ("--kv-memory", self.kv_memory),
        ):
            if value is not None and value < 1:
                raise ConfigError(name, got=value, expected="at least 1")
        if self.max_batched_tokens <= self.max_num_seqs:
            raise ConfigError(
                "--max-batched-tokens",
                got=self.max_batched_tokens,
                expected=f"more than --max-num-seqs, {self.max_num_seqs}",
                action="Every running sequence takes a token of a step, and prompts need some too.",
            )
        if not 0 <= self.speculate <= 32:
            raise ConfigError("--speculate", got=self.speculate, expected="0 to 32 tokens")
