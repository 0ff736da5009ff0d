"""Which part of a model a rank holds, when several processes share one.

    q, k, v, gate, up      rows: a rank computes some heads, some intermediate channels      (column parallel)
    o, down                columns: it multiplies what it has computed; the terms are summed (row parallel);
                           floating ones, whose sums depend on their order, rows: inputs are gathered before
    embedding, head        rows: some of the vocabulary
    router                 all of it, on every rank: all know which experts a token goes through
    experts                gate, up: rows, some channels of every expert. down: rows too, some outputs: what an expert
                           computes in between is small, and gathered before; so no weight has to be copied
                           expert parallel: all of some experts; what all tokens pass through is cut as above

quant_bias of o and down is counted once: rank 0 has it. Their bias is added by all, to the sum.

Letters: H query heads, G key/value heads, D head_dim, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eightfold.config import ModelConfig
from eightfold.errors import ConfigError, one_of

# Where intermediate size and vocabulary are cut: at cache lines, where there are enough of them.
_UNITS = (64, 16, 4, 1)
_LEAST_UNITS = 4  # of a rank

_ROW_PARALLEL = ("o", "down")


class Cut(NamedTuple):
    """What of a linear (N, K) a rank holds.

    Attributes:
        rows: outputs; all of them where `columns` is given.
        columns: inputs; None for all.
        counts_bias: whether quant_bias is in the rank's products.
    """

    rows: slice
    columns: slice | None
    counts_bias: bool


@dataclass(frozen=True)
class Share:
    """One of `size` parts of a model, that of `rank`.

    Attributes:
        rank: whose part.
        size: how many parts there are.
        whole_experts: whether a rank has all of some experts, and not some of all.
    """

    rank: int = 0
    size: int = 1
    whole_experts: bool = False

    def require(self, config: ModelConfig, directory: Path) -> None:
        """Check that every rank gets as much work in attention, some of every MLP, and experts if these are shared.

        Raises:
            ConfigError: the heads are not a multiple of the ranks, an MLP has fewer channels, or the model is dense.
        """
        if self.whole_experts and config.experts is None:
            expected = "one with experts"
            raise ConfigError("expert_parallel", got="a dense model", expected=expected, action="Leave it out.")
        channels = config.intermediate_size
        if self.size not in (sizes := even_sizes(config)):
            expected = (
                f"{one_of(sizes)}, among which {config.num_heads} query heads and {config.num_kv_heads} "
                "key/value heads can be shared out evenly"
            )
        elif self.size > channels and not all(map(config.is_sparse, range(config.num_layers))):
            expected = f"at most {channels}, among which the channels of an MLP can be shared out"
        else:
            return
        action = "Change --nproc_per_node or --nnodes of torchrun."
        raise ConfigError("number of processes", where=directory, got=self.size, expected=expected, action=action)

    def heads(self, config: ModelConfig) -> slice:
        each = config.num_heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def kv_heads(self, config: ModelConfig) -> slice:
        """Return the rank's key/value heads: those that its query heads read; some ranks share one."""
        heads, per_key = self.heads(config), config.num_heads // config.num_kv_heads
        return slice(heads.start // per_key, (heads.stop - 1) // per_key + 1)

    def part(self, total: int) -> slice:
        """Return the rank's part of channels or tokens that are cut as `cuts` cuts them."""
        at = cuts(total, self.size)
        return slice(at[self.rank], at[self.rank + 1])

    def of_linear(self, config: ModelConfig, group: str, part: int, *, is_float: bool) -> Cut:
        """Return what of a linear the rank holds.

        Args:
            config: of the model.
            group: title of the linear's group, or `head`.
            part: which linear of the group it is: of qkv 0, 1 or 2.
            is_float: whether its weights are.
        """
        if group == "head":
            return Cut(self.part(config.vocab_size), None, True)
        if group in _ROW_PARALLEL and is_float:
            return Cut(self.part(config.hidden_size), None, True)
        inner = self._inner(config, group, part)
        if group in _ROW_PARALLEL:
            return Cut(slice(None), None if self.size == 1 else inner, self.rank == 0)
        return Cut(inner, None, True)

    def experts(self, count: int) -> range:
        """Return the experts of a layer of which the rank has something, by their index."""
        at = self.expert_cuts(count)
        return range(at[self.rank], at[self.rank + 1]) if at else range(count)

    def expert_cuts(self, count: int) -> list[int]:
        """Return where the experts of each rank begin, and their number; nothing where every rank has some of each."""
        is_apart = self.whole_experts and self.size > 1
        return [count * rank // self.size for rank in range(self.size + 1)] if is_apart else []

    def of_expert(self, config: ModelConfig, part: str, *, is_shared: bool) -> slice:
        """Return which rows of an expert's linear the rank holds, if it has something of the expert.

        Args:
            config: of the model.
            part: gate, up or down.
            is_shared: whether all tokens pass through the expert.
        """
        if config.experts is None or (self.whole_experts and not is_shared):
            return slice(None)
        if part == "down":
            return self.part(config.hidden_size)
        return self.part(config.experts.shared_size if is_shared else config.experts.intermediate_size)

    def _inner(self, config: ModelConfig, group: str, part: int) -> slice:
        """Return the channels between the linears of a block that the rank computes."""
        if group in ("gate_up", "down"):
            return self.part(config.intermediate_size)
        heads = self.kv_heads(config) if group == "qkv" and part > 0 else self.heads(config)
        return slice(heads.start * config.head_dim, heads.stop * config.head_dim)


WHOLE = Share()


def cuts(total: int, size: int) -> list[int]:
    """Return where each of `size` parts of about the same size begins, and the total: size + 1 numbers.

    They begin at multiples of a cache line, if there are many channels.
    """
    unit = next(unit for unit in _UNITS if total >= unit * size * _LEAST_UNITS or unit == 1)
    units = -(-total // unit)
    return [min(total, units * rank // size * unit) for rank in range(size + 1)]


def even_sizes(config: ModelConfig) -> list[int]:
    """Return how many ranks can share the heads of a model evenly; a key/value head may be on several ranks."""
    heads, keys = config.num_heads, config.num_kv_heads
    return [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]
