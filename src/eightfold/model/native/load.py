"""Checkpoint -> native model. Weights stay where they are, in the mapped files; only small tensors are copied.

Letters: N outputs, K inputs, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eightfold.architectures import Experts
from eightfold.config import ModelConfig
from eightfold.errors import UnsupportedError
from eightfold.families import Rows, all_linears, input_groups, slides, sliding_window
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import resident_bytes
from eightfold.model import layers
from eightfold.model import native as core
from eightfold.model.native.model import NativeModel
from eightfold.parallel.share import WHOLE, Share, cuts
from eightfold.scheme import QuantType, weight_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eightfold.model.native._core import Model

KINDS = {
    QuantType.FLOAT: "float",
    QuantType.W8A8: "w8a8",
    QuantType.W8A8_DYNAMIC: "dynamic",
    QuantType.W8A8_MIX: "mix",
    QuantType.W8A16: "w8a16",
}

# Sums of K products of an unsigned and a signed byte fit 32 bits up to here: 255 * 128 * K < 2**31.
MAX_INPUTS = 65_793

# So many threads can spare the core on which Python is busy.
_MANY_THREADS = 4

_NOTHING: NDArray[Any] = np.zeros(0, np.float32)
_NO_INTEGERS: NDArray[Any] = np.zeros(0, np.int32)
_NO_NORM = layers.Norm(_NOTHING, None)


def load_model(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    dynamic: Literal["asymmetric", "symmetric"] = "asymmetric",
    attention: Literal["cache", "mindie"] = "cache",
    longest: int | None = None,
    share: Share = WHOLE,
    expert_parallel: bool = False,
    neighbours: int = 1,
    beside: Callable[[], object] | None = None,
) -> NativeModel:
    """Build the native model of a checkpoint, or a rank's share of it.

    Args:
        checkpoint: any scheme.
        threads: how many compute; None takes one for each CPU this process may use.
        dynamic: how W8A8_DYNAMIC quantizes a token.
        attention: what a prompt's tokens attend over when keys and values are int8: what the cache holds, or the fresh
            keys and values (in bfloat16); prompts then have to run whole.
        longest: positions of the longest sequence, by which dynamic scaling and longrope turn keys; None: the model's
            context.
        share: what of the model; anything but the whole has to meet the others before it can run.
        expert_parallel: whether the share has whole experts, and not a part of every one.
        neighbours: processes of this host that load a share of it, this one included.
        beside: is called while the weights are made ready; what it raises ends that. By how much loading has made the
            process larger is not known then.

    Raises:
        ConfigError: the heads cannot be shared out evenly, or experts are to be and there are none.
        UnsupportedError: no compiled extension, a shape outside its limits, or FAQuant with an offset that is not zero.
        CheckpointError: a scale that is not a finite number.
    """
    config, resident = checkpoint.config, resident_bytes() or 0
    share = replace(share, whole_experts=expert_parallel)
    core.name_cut_files()
    _require_shapes(checkpoint)
    share.require(config, checkpoint.directory)
    isa = core.choose_isa()
    model = _empty_model(config, share, isa, core.choose_threads(threads), dynamic, longest or config.context)
    loader = _Loader(checkpoint, model, share)
    for layer_idx in range(config.num_layers):
        loader.add_layer(layer_idx)
    loader.add_ends()
    damaged = _finish(model, beside)
    if damaged >= 0:
        layers.require_finite(checkpoint, loader.weights[damaged])
    float_prompts = attention == "mindie" and checkpoint.has_int8_attention
    loaded = NativeModel(model, config, isa, float_prompts, neighbours)
    if beside is None:
        loaded.resident_weights = (max((resident_bytes() or 0) - resident, 0),)
    return loaded


def _empty_model(config: ModelConfig, share: Share, isa: str, threads: int, dynamic: str, longest: int) -> Model:
    """Return a model that has its sizes, and no weights yet."""
    model = core.extension.Model(
        isa=isa,
        threads=threads,
        num_layers=config.num_layers,
        hidden=cuts(config.hidden_size, share.size),
        intermediate=cuts(config.intermediate_size, share.size),
        vocab=cuts(config.vocab_size, share.size),
        rank=share.rank,
        heads=_length(share.heads(config)),
        kv_heads=_length(share.kv_heads(config)),
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        symmetric_tokens=dynamic == "symmetric",
        inv_freq=layers.inverse_frequencies(config.rope, config.rotary_dim, longest),
        **_expert_sizes(config.experts, share),
    )
    if (scale := layers.rope_scale(config.rope)) != 1:
        model.set_rope_scale(scale)
    if (local := config.local_rope) is not None:
        frequencies = layers.inverse_frequencies(local, config.rotary_dim, longest)
        model.set_local_rope(frequencies, layers.rope_scale(local))
    model.set_switches(
        activation=config.activation,
        interleaved=config.rotary_interleaved,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        score_multiplier=config.score_multiplier or 0,
        logits_multiplier=config.logits_multiplier,
        attention_softcap=config.attention_softcap or 0,
        logits_softcap=config.logits_softcap or 0,
    )
    return model


def _expert_sizes(experts: Experts | None, share: Share) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "experts": [experts.count, experts.per_token],
        "expert_sizes": cuts(experts.intermediate_size, share.size),
        "shared_sizes": cuts(experts.shared_size, share.size),
        "expert_owners": share.expert_cuts(experts.count),
        "normalizes_experts": experts.normalizes,
    }


def _finish(model: Model, beside: Callable[[], object] | None) -> int:
    """Make the weights ready; return the ordinal of a damaged one, or -1."""
    if beside is None:
        return model.finish(forgets_head=True)  # it lies in a mapped file
    # A signal may raise anywhere here. So nothing of `threading`, whose objects are Python code that it could leave
    # half done. Python must not end around a thread that computes: it is waited for, or sees that it must not begin.
    found: list[int | BaseException] = []
    entered, stopped = list[bool](), list[bool]()
    done = _thread.allocate_lock()
    done.acquire()

    def finish() -> None:
        entered.append(True)
        try:
            found.append(-1 if stopped else model.finish(forgets_head=True))
        except BaseException as error:
            found.append(error)
        finally:
            done.release()

    # Python keeps one core busy meanwhile; few threads would take turns with it, and both be late.
    model.leave_alone(model.threads < _MANY_THREADS)
    try:
        _thread.start_new_thread(finish, ())
        beside()
        model.leave_alone(False)
        while not found:
            done.acquire()
    except BaseException:
        while not stopped or (entered and not found):
            with contextlib.suppress(BaseException):
                stopped.append(True)
                model.abandon()
                while entered and not found:
                    done.acquire()
        raise
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def _require_shapes(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    widest = max(linear.k for linear in all_linears(config).values())
    limits = (("inputs of a linear", widest, MAX_INPUTS), ("head_dim", config.head_dim, 512))
    for what, got, most in (*limits, ("num_attention_heads", config.num_heads, 65536)):
        if got > most:
            raise UnsupportedError(
                what,
                where=checkpoint.directory,
                got=got,
                expected=f"at most {most}",
                action="Use --backend reference.",
            )


class _Loader:
    """Hands a checkpoint's tensors to the extension."""

    def __init__(self, checkpoint: Checkpoint, model: Model, share: Share) -> None:
        self.checkpoint, self.config, self.model, self.share = checkpoint, checkpoint.config, model, share
        self.weights: list[str] = []  # as the extension has got them

    def add_layer(self, layer_idx: int) -> None:
        names = self.config.names
        prefix = names.layer(layer_idx)
        for group in input_groups(self.config, layer_idx):
            read = [layers.read_linear(self.checkpoint, prefix + shape.name, shape) for shape in group.linears]
            parts = list[tuple[layers.Linear, Rows | None]]((read[0], rows) for rows in group.parts)
            for part, (linear, rows) in enumerate(parts or [(linear, None) for linear in read]):
                self._add_linear(layer_idx, group.title, part, linear, rows)
        if self.config.experts is not None:
            held = self.share.experts(self.config.experts.count)
            self._add_experts(layer_idx, held, layers.read_experts(self.checkpoint, layer_idx, held))
        self._set_norms_and_attention(layer_idx)

    def _set_norms_and_attention(self, layer_idx: int) -> None:
        """Hand over a layer's norms and how its attention is computed."""
        names, norms = self.config.names, layers.read_norms(self.checkpoint, layer_idx)

        def norm(name: str) -> layers.Norm:
            return norms.get(name, _NO_NORM)

        before, after = norm(names.before_attention), norm(names.after_attention)
        between, last = norm(names.before_ffn), norm(names.after_ffn)
        self.model.set_norms(
            layer_idx,
            input_gain=before.gain,
            input_bias=_given(before.bias),
            post_gain=between.gain,
            post_bias=_given(between.bias),
        )
        self.model.set_term_norms(
            layer_idx,
            o_gain=after.gain,
            o_bias=_given(after.bias),
            down_gain=last.gain,
            down_bias=_given(last.bias),
        )
        self.model.set_attention(
            layer_idx,
            window=sliding_window(self.config, layer_idx) or 0,
            is_local=self.config.local_rope is not None and slides(self.config, layer_idx),
            query_norm=norm(names.q_norm).gain,
            key_norm=norm(names.k_norm).gain,
            **self._attention(layers.read_attention(self.checkpoint, layer_idx)),
        )

    def add_ends(self) -> None:
        name = weight_name(self.config.names.embedding)
        self.weights.append(name)
        self.model.set_embedding(self.checkpoint.array(name)[self.share.part(self.config.vocab_size)])
        gain, bias = layers.read_norm(self.checkpoint, self.config.names.final_norm)
        self.model.set_final_norm(gain, _given(bias))
        self._add_linear(-1, "head", 0, layers.read_head(self.checkpoint))

    def _add_linear(self, layer_idx: int, group: str, part: int, linear: layers.Linear, of: Rows | None = None) -> None:
        """Hand over what the rank has of a linear.

        Args:
            layer_idx: or -1 for the head.
            group: its title.
            part: which linear of the group it is.
            linear: as it is stored.
            of: of a tensor that holds the whole group, the rows of this one.
        """
        cut = self.share.of_linear(self.config, group, part, is_float=linear.kind is QuantType.FLOAT)
        rows = _rows(of, cut.rows)
        weight = linear.weight[rows] if cut.columns is None else self._columns(linear, cut.columns)
        if isinstance(rows, list):  # they are a copy
            self.checkpoint.release([linear.name])
        self.weights.append(linear.name)
        _hand_over(partial(self.model.add_linear, layer_idx, group), linear, weight, rows, cut.counts_bias)

    def _add_experts(self, layer_idx: int, held: range, read: layers.Experts | None) -> None:
        if read is None:
            return
        routers = [read.router] if read.shared_gate is None else [read.router, read.shared_gate]
        self.weights += [router.name for router in routers]
        self.model.add_router(layer_idx, *(router.weight for router in routers))
        for index, expert in zip(held, read.experts, strict=False):  # the core counts them
            self._add_expert(layer_idx, index, expert, is_shared=False)
        if read.shared is not None:
            self._add_expert(layer_idx, len(read.router.weight), read.shared, is_shared=True)

    def _add_expert(self, layer_idx: int, index: int, expert: layers.Expert, *, is_shared: bool) -> None:
        for part, linear in zip(expert._fields, expert, strict=True):
            rows = self.share.of_expert(self.config, part, is_shared=is_shared)
            self.weights.append(linear.name)
            _hand_over(partial(self.model.add_expert, layer_idx, index, part), linear, linear.weight[rows], rows)

    def _attention(self, read: layers.Attention) -> dict[str, Any]:
        """Return the kind of cache and its scales: (scale, reciprocal, offset) of keys and of values, (G * D,) each."""
        if read.key is None or read.value is None:
            return {"kind": "bf16", "query_inv": _NOTHING, "score_scale": _NOTHING, "key": [], "value": []}
        key, value = self._channels(read.key), self._channels(read.value)
        if read.query_scale is None:
            return {"kind": "int8x2", "query_inv": _NOTHING, "score_scale": _NOTHING, "key": key, "value": value}
        config, factor = self.config, self.config.score_multiplier
        heads, per_key = self.share.heads(config), config.num_heads // config.num_kv_heads
        query_scale = read.query_scale[heads]
        key_of_head = [head // per_key for head in range(heads.start, heads.stop)]
        score_scale = query_scale * read.key.scale[key_of_head, 0]
        score_scale = score_scale / np.float32(np.sqrt(config.head_dim)) if factor is None else score_scale * factor
        query_inv = np.float32(1) / query_scale
        return {"kind": "int8", "query_inv": query_inv, "score_scale": score_scale, "key": key, "value": value}

    def _channels(self, read: layers.Channels) -> list[NDArray[Any]]:
        heads = self.share.kv_heads(self.config)
        scale_C = read.scale[heads].reshape(-1)
        offset_C = np.zeros_like(scale_C) if read.offset is None else read.offset[heads].reshape(-1)
        return [scale_C, np.float32(1) / scale_C, offset_C]

    def _columns(self, linear: layers.Linear, columns: slice) -> NDArray[Any]:
        """Return a copy of columns of a weight, in memory of its own; the file's pages are let go."""
        share = linear.weight[:, columns]
        # Anonymous memory of whole pages: rows that are multiples of a cache line start at one.
        memory = mmap.mmap(-1, max(share.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        copy = np.frombuffer(memory, share.dtype, share.size).reshape(share.shape)
        copy[:] = share
        self.checkpoint.release([linear.name])
        return copy


def _hand_over(
    add: Callable[..., None],
    linear: layers.Linear,
    weight: NDArray[Any],
    rows: slice | list[int],
    counts_bias: bool = True,
) -> None:
    """Call the extension with some rows of a linear, and what a rank has of their weight."""
    offset, quant_bias = _given(linear.weight_offset, rows), _NO_INTEGERS
    if linear.quant_bias is not None:
        quant_bias = linear.quant_bias[rows] if counts_bias else np.zeros(len(weight), np.int32)
    scale = _given(linear.weight_scale, rows)
    if linear.kind is not QuantType.FLOAT and linear.weight_scale is None:
        scale = np.ones(len(weight), np.float32)
    add(
        KINDS[linear.kind],
        weight,
        scale=scale,
        offset=offset if offset.any() else _NOTHING,
        bias=_given(linear.bias, rows),
        deq_scale=_given(linear.deq_scale, rows),
        quant_bias=quant_bias,
        inv_input_scale=0.0 if linear.input_scale is None else float(np.float32(1) / linear.input_scale[0]),
        input_offset=0.0 if linear.input_offset is None else float(linear.input_offset[0]),
    )


def _rows(of: Rows | None, inside: slice) -> slice | list[int]:
    """Return where some rows of a linear lie in its tensor: the linear's own, or one that holds `of` and more."""
    if of is None:
        return inside
    if of.blocks > 1:
        return of.indices()[inside]
    found = range(of.first, of.first + of.size)[inside]
    return slice(found.start, found.stop)


def _given(values: NDArray[Any] | None, rows: slice | list[int] = slice(None)) -> NDArray[Any]:
    """Return some of the values as the extension takes them: none where there are none."""
    return _NOTHING if values is None else values[rows]


def _length(of: slice) -> int:
    return int(of.stop - of.start)
