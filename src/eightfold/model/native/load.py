"""Checkpoint -> native model. Weights stay where they are, in the mapped files; only small tensors are copied.

Letters: N outputs, K inputs, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eightfold.config import DType
from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.families import (
    ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    KEY,
    LM_HEAD,
    VALUE,
    LinearShape,
    all_linears,
    input_groups,
    layer_norms,
    layer_prefix,
    sliding_window,
)
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import resident_bytes
from eightfold.model.native import core
from eightfold.model.native.model import NativeModel
from eightfold.model.native.rotary import inverse_frequencies
from eightfold.parallel.share import WHOLE, Share, cuts
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    FA_K,
    FA_Q,
    FA_V,
    INPUT_OFFSET,
    INPUT_SCALE,
    KV_OFFSET,
    KV_SCALE,
    NEEDS_CALIBRATION,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    legacy_norm,
    weight_name,
)

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


def load_model(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    dynamic: Literal["asymmetric", "symmetric"] = "asymmetric",
    attention: Literal["cache", "mindie"] = "cache",
    share: Share = WHOLE,
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
        share: what of the model; anything but the whole has to meet the others before it can run.
        neighbours: processes of this host that load a share of it, this one included.
        beside: is called while the weights are made ready; what it raises ends that. By how much loading has made the
            process larger is not known then.

    Raises:
        ConfigError: the heads cannot be shared out evenly.
        UnsupportedError: no compiled extension, a shape outside its limits, or FAQuant with an offset that is not zero.
        CheckpointError: a scale that is not a finite number.
    """
    config, resident = checkpoint.config, resident_bytes() or 0
    _require_shapes(checkpoint)
    share.require(config, checkpoint.directory)
    isa = core.choose_isa()
    model = core.extension.Model(
        isa=isa,
        threads=core.choose_threads(threads),
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
        inv_freq=inverse_frequencies(config.rope, config.head_dim),
    )
    loader = _Loader(checkpoint, model, share)
    for layer_idx in range(config.num_layers):
        loader.add_layer(layer_idx)
    loader.add_ends()
    damaged = _finish(model, beside)
    if damaged >= 0:
        loader.require_finite(loader.weights[damaged])
    float_prompts = attention == "mindie" and checkpoint.has_int8_attention
    loaded = NativeModel(model, config, isa, float_prompts, neighbours)
    if beside is None:
        loaded.resident_weights = (max((resident_bytes() or 0) - resident, 0),)
    return loaded


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
    for what, got, most in (("inputs of a linear", widest, MAX_INPUTS), ("head_dim", config.head_dim, 512)):
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
        prefix = layer_prefix(layer_idx)
        for group in input_groups(self.config):
            for linear in group.linears:
                self._add_linear(layer_idx, group.title, prefix + linear.name, linear)
        norms = {name: self._norm(prefix + name) for name in layer_norms(self.config)}
        (input_gain, input_bias), (post_gain, post_bias) = norms["input_layernorm"], norms["post_attention_layernorm"]
        self.model.set_norms(
            layer_idx, input_gain=input_gain, input_bias=input_bias, post_gain=post_gain, post_bias=post_bias
        )
        none = (_NOTHING, _NOTHING)
        query_norm, key_norm = norms.get("self_attn.q_norm", none)[0], norms.get("self_attn.k_norm", none)[0]
        self.model.set_attention(
            layer_idx, window=sliding_window(self.config, layer_idx) or 0, query_norm=query_norm, key_norm=key_norm,
            **self._attention(layer_idx)
        )  # fmt: skip

    def add_ends(self) -> None:
        self.model.set_embedding(self._rows(weight_name(EMBEDDING), self.share.part(self.config.vocab_size)))
        self.model.set_final_norm(*self._norm(FINAL_NORM))
        if self.config.tie_word_embeddings:
            weight = self._rows(self.checkpoint.head_weight(), self.share.part(self.config.vocab_size))
            self._add_float(-1, "head", weight, _NOTHING)
        else:
            self._add_linear(-1, "head", LM_HEAD, all_linears(self.config)[LM_HEAD])

    def _add_linear(self, layer_idx: int, group: str, module: str, linear: LinearShape) -> None:
        kind = self.checkpoint.quant_type(module)
        cut = self.share.of_linear(self.config, linear.name, is_float=kind is QuantType.FLOAT)
        bias = self._values(f"{module}.{BIAS}")[cut.rows] if linear.has_bias else _NOTHING
        name = weight_name(module)
        weight = self._rows(name, cut.rows) if cut.columns is None else self._columns(name, cut.columns)
        if kind is QuantType.FLOAT:
            self._add_float(layer_idx, group, weight, bias)
            return
        is_static = kind in NEEDS_CALIBRATION
        weight_scale = f"{module}.{WEIGHT_SCALE}"
        offset = self._values(f"{module}.{WEIGHT_OFFSET}")[cut.rows] if kind is QuantType.W8A16 else _NOTHING
        quant_bias = self._integers(f"{module}.{QUANT_BIAS}")[cut.rows] if is_static else _NO_INTEGERS
        self.model.add_linear(
            layer_idx,
            group,
            KINDS[kind],
            weight,
            scale=self._values(weight_scale)[cut.rows] if weight_scale in self.checkpoint.tensors else _ones(weight),
            offset=offset if offset.any() else _NOTHING,
            bias=bias,
            deq_scale=self._deq_scale(module)[cut.rows] if is_static else _NOTHING,
            quant_bias=quant_bias if cut.counts_bias else np.zeros_like(quant_bias),
            inv_input_scale=float(np.float32(1) / self._values(f"{module}.{INPUT_SCALE}")[0]) if is_static else 0.0,
            input_offset=float(self._values(f"{module}.{INPUT_OFFSET}")[0]) if is_static else 0.0,
        )

    def _add_float(self, layer_idx: int, group: str, weight: NDArray[Any], bias: NDArray[Any]) -> None:
        self.model.add_linear(
            layer_idx, group, "float", weight, scale=_NOTHING, offset=_NOTHING, bias=bias,
            deq_scale=_NOTHING, quant_bias=_NO_INTEGERS, inv_input_scale=0.0, input_offset=0.0,
        )  # fmt: skip

    def _norm(self, module: str) -> tuple[NDArray[Any], NDArray[Any]]:
        gain = self._values(weight_name(module))
        stored = [b for b in (bias_name(module), bias_name(legacy_norm(module))) if b in self.checkpoint.tensors]
        bias = self._values(stored[0]) if stored else _NOTHING
        return gain, bias if bias.any() else _NOTHING

    def _attention(self, layer_idx: int) -> dict[str, Any]:
        """Return the kind of cache and its scales: (scale, reciprocal, offset) of keys and of values, (G * D,) each."""
        kind, prefix = self.checkpoint.attention_type(layer_idx), layer_prefix(layer_idx)
        if kind is QuantType.FLOAT:
            return {"kind": "bf16", "query_inv": _NOTHING, "score_scale": _NOTHING, "key": [], "value": []}
        if kind is QuantType.C8:
            key, value = (self._channels(f"{prefix}{part}", KV_SCALE, KV_OFFSET) for part in (KEY, VALUE))
            return {"kind": "int8x2", "query_inv": _NOTHING, "score_scale": _NOTHING, "key": key, "value": value}
        module, config, dim = prefix + ATTENTION, self.config, self.config.head_dim
        heads, per_key = self.share.heads(config), config.num_heads // config.num_kv_heads
        for part in (FA_Q, FA_K, FA_V):
            self._require_zeros(f"{module}.{part}.{OFFSET}")
        key, value = (self._channels(f"{module}.{part}", SCALE, "") for part in (FA_K, FA_V))
        query_scale = self._values(f"{module}.{FA_Q}.{SCALE}").reshape(config.num_heads, -1)[heads, 0]
        first_key = self.share.kv_heads(config).start
        key_of_head = [h // per_key - first_key for h in range(heads.start, heads.stop)]
        key_scale = key[0].reshape(-1, dim)[key_of_head, 0]
        score_scale = query_scale * key_scale / np.float32(np.sqrt(dim))
        query_inv = np.float32(1) / query_scale
        return {"kind": "int8", "query_inv": query_inv, "score_scale": score_scale, "key": key, "value": value}

    def _channels(self, module: str, scale: str, offset: str) -> list[NDArray[Any]]:
        shape = (self.config.num_kv_heads, self.config.head_dim)
        heads = self.share.kv_heads(self.config)
        stored = self._values(f"{module}.{scale}").reshape(shape[0], -1)
        scale_C = np.ascontiguousarray(np.broadcast_to(stored, shape)[heads]).reshape(-1)
        name = f"{module}.{offset}"
        has_offset = name in self.checkpoint.tensors
        offset_C = self._values(name).reshape(shape)[heads].reshape(-1) if has_offset else np.zeros_like(scale_C)
        return [scale_C, np.float32(1) / scale_C, offset_C]

    def _require_zeros(self, name: str) -> None:
        """Refuse an offset that nothing here would subtract."""
        values = self._values(name) if name in self.checkpoint.tensors else _NOTHING
        if values.any():
            raise UnsupportedError(
                f"values of {name}",
                where=self.checkpoint.tensors[name].file,
                got=f"{values.min():g} to {values.max():g}",
                expected="zeros",
                action="Attention is computed without offsets; quantize it symmetrically.",
            )

    def _deq_scale(self, module: str) -> NDArray[Any]:
        stored = self.checkpoint.array(f"{module}.{DEQ_SCALE}").reshape(-1)
        if stored.dtype == np.int64:  # float32 bits in the low half
            return stored.astype(np.int32).view(np.float32)
        return self._values(f"{module}.{DEQ_SCALE}")

    def _integers(self, name: str) -> NDArray[Any]:
        return np.ascontiguousarray(self.checkpoint.array(name).reshape(-1), dtype=np.int32)

    def _values(self, name: str) -> NDArray[Any]:
        """Return a small tensor as a flat float32 copy."""
        array = self.checkpoint.array(name).reshape(-1)
        if self.checkpoint.tensors[name].dtype == DType.BF16.value:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        values = np.array(array, dtype=np.float32)
        if not np.isfinite(values).all():
            self.require_finite(name)
        return values

    def _rows(self, name: str, rows: slice) -> NDArray[Any]:
        """Return rows of a weight as they lie in the file."""
        self.weights.append(name)
        return self.checkpoint.array(name)[rows]

    def _columns(self, name: str, columns: slice) -> NDArray[Any]:
        """Return a copy of columns of a weight, in memory of its own; the file's pages are let go."""
        self.weights.append(name)
        array = self.checkpoint.array(name)
        share = array[:, columns]
        # Anonymous memory of whole pages: rows that are multiples of a cache line start at one.
        memory = mmap.mmap(-1, max(share.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        copy = np.frombuffer(memory, share.dtype, share.size).reshape(share.shape)
        copy[:] = share
        self.checkpoint.release([name])
        return copy

    def require_finite(self, name: str) -> None:
        """Refuse a tensor with a number that is not finite, and name the first."""
        array = self.checkpoint.array(name)
        array = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
        if self.checkpoint.tensors[name].dtype == DType.BF16.value:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        for row, column in np.argwhere(~np.isfinite(array))[:1]:
            raise CheckpointError(
                f"{name}[{row}, {column}]",
                where=self.checkpoint.tensors[name].file,
                got=float(array[row, column]),
                expected="a finite number",
                action="The weights are damaged; fetch the model again.",
            )


def _ones(weight_NK: NDArray[Any]) -> NDArray[Any]:
    return np.ones(len(weight_NK), np.float32)


def _length(of: slice) -> int:
    return int(of.stop - of.start)
