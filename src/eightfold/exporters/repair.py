"""What is written of a directory so that a loader reads it, and what that changes.

    types       by what is stored; the description decides where the tensors of two types are the same
    groups      q, k, v (gate, up) become one linear in the loader: one type, one input_scale
    attention   a cache or an attention that the loader does not have is left out
    the rest    names of older writers, zeros that were left out, dtypes, entries without a tensor

Repairs keep what is computed. Losses do not, or take memory: they have to be asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightfold.architectures import FAMILIES
from eightfold.check.directory import RawDirectory, cast, differ
from eightfold.config import CONFIG_DTYPES, DType
from eightfold.errors import CheckpointError, UnsupportedError, one_of, plural, shortlist
from eightfold.exporters.repaired import Repair, RepairedLinear, Stored, Written, rounded
from eightfold.exporters.repaired_attention import add_attention, add_cache
from eightfold.exporters.repaired_experts import experts_entries, is_expert, require_experts
from eightfold.families import LinearShape
from eightfold.format.description import SHORT_NAME
from eightfold.format.shards import PlannedTensor
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    INPUT_SCALE,
    LINEAR_TENSORS,
    NEEDS_CALIBRATION,
    QUANT_BIAS,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    bias_name,
    legacy_norm,
    weight_name,
)

_FLOATS = ("F32", "F16", "BF16")
_PER_ROW = (QuantType.W8A8_DYNAMIC, QuantType.W8A16)
_PACKS_MIXED = NEEDS_CALIBRATION  # types of which MindIE keeps some of q, k, v float


def plan_repair(d: RawDirectory, target: str) -> Repair:
    """Plan a directory anew for a loader.

    Args:
        d: an 8-bit model of a family with an engine; each expert a linear of its own.
        target: mindie or vllm-ascend.

    Raises:
        CheckpointError: something is missing that nothing else tells, or of another shape.
        UnsupportedError: a type that this program does not know, or a model that it cannot convert.
    """
    return _Planner(d, target).plan()


class _Planner:
    def __init__(self, d: RawDirectory, target: str) -> None:
        if FAMILIES[d.model.architecture].is_wrapper:
            raise UnsupportedError("model", where=d.path, got="one that sees images too", expected="a text model")
        self.d, self.target = d, target
        self.out = Repair(self._dtype())
        self.stored = Stored(d, self.out.dtype)
        self.description = self._description()
        labels = {key: value for key, value in self.description.items() if isinstance(value, str)}
        self.labels = {name: labels.get(weight_name(name)) for name in (*d.linears, d.model.names.head)}

    def plan(self) -> Repair:
        d, names = self.d, self.d.model.names
        embedding = weight_name(names.embedding)
        self._require([embedding])
        self.out.copy(self.stored, embedding, (d.head.n, d.head.k))
        linears = {name: self._linear(name, shape) for name, shape in d.linears.items()}
        if all(linear.was is QuantType.FLOAT for linear in linears.values()):
            raise UnsupportedError("model", where=d.path, got="a float model", expected="an 8-bit one",
                                   action="Quantize it with `eightfold quantize`.")  # fmt: skip
        require_experts(d, linears, self.target)
        self._agree(linears)
        self.out.types = {name: linear.kind for name, linear in linears.items()}
        self.out.bare.update(experts_entries(d, self.out.types))
        self.out.kind = self._whole(linears)
        for linear in linears.values():
            self._add_linear(linear)
        self._add_head()
        self._add_norms()
        add_cache(d, self.stored, self.target, self.out)
        add_attention(d, self.stored, self.target, self.out)
        self._tell_of_the_rest()
        return self.out

    # --- what the directory says

    def _dtype(self) -> DType:
        said = CONFIG_DTYPES.get(
            str(self.d.config.get("torch_dtype") or self.d.config.get("dtype")).removeprefix("torch.")
        )
        if said in (DType.F16, DType.BF16):
            return said
        kinds = Counter(info.dtype for info in self.d.tensors.values() if info.dtype in ("F16", "BF16"))
        return DType(kinds.most_common(1)[0][0]) if kinds else DType.BF16

    def _description(self) -> Mapping[str, Any]:
        found = self.d.descriptions
        if SHORT_NAME in found:
            return found[SHORT_NAME]
        if len(found) > 1:
            raise CheckpointError(
                "description", where=self.d.path, got=shortlist(found), expected=f"one, or {SHORT_NAME}"
            )
        for name, content in found.items():
            self.out.repair(f"{name} is now {SHORT_NAME}")
            return content
        damaged = [name for name in self.d.damaged if name.startswith("quant_model_description")]
        self.out.repair("the description is made from what is stored", *damaged)
        return {}

    def _require(self, names: Iterable[str]) -> None:
        if absent := self.d.absent(names):
            if broken := [why for file, why in self.d.damaged.items() if file.endswith(".safetensors")]:
                raise CheckpointError(broken[0])  # which may hold them
            raise CheckpointError(
                f"{plural(len(absent), 'tensor')} missing",
                where=self.d.path,
                got=f"no {shortlist(absent)}",
                expected="all weights of the model",
                action="Fetch or make the directory again.",
            )

    def _linear(self, name: str, shape: LinearShape) -> RepairedLinear:
        weight = weight_name(name)
        self._require([weight])
        info = self.stored.tensors[weight]
        if info.shape != (shape.n, shape.k):
            raise CheckpointError(weight, where=info.file, got=list(info.shape), expected=[shape.n, shape.k])
        if info.dtype not in (DType.I8.value, *_FLOATS):
            expected = one_of([DType.I8.value, *_FLOATS])
            raise CheckpointError(f"type of {weight}", where=info.file, got=info.dtype, expected=expected)
        kind = self._kind(name)
        if self.labels[name] != kind.value:
            was = self.labels[name] or "none"
            self.out.repair(f"the entry of weights that are {kind.value} was {was}", weight)
        linear = RepairedLinear(self.stored, name, shape, kind, kind)
        linear.require_sound()
        return linear

    def _kind(self, name: str) -> QuantType:
        """Return a linear's type: by its tensors, and by the description where they leave two."""
        label, whole = self.labels[name], self.description.get("model_quant_type")
        if self.stored.tensors[weight_name(name)].dtype in _FLOATS:
            return QuantType.FLOAT
        if label is not None and label not in LINEAR_TENSORS:
            known = one_of(kind.value for kind in LINEAR_TENSORS)
            raise UnsupportedError(f"type of {weight_name(name)}", where=self.d.path, got=label, expected=known)
        has = {suffix for suffix in (INPUT_SCALE, DEQ_SCALE, QUANT_BIAS) if self.stored.has(f"{name}.{suffix}")}
        possible = tuple(NEEDS_CALIBRATION) if has else _PER_ROW
        said = [QuantType(kind) for kind in (label, whole) if kind in LINEAR_TENSORS]
        if found := [kind for kind in said if kind in possible]:
            return found[0]
        if has:
            return QuantType.W8A8
        if not self.stored.has(f"{name}.{WEIGHT_SCALE}"):
            raise CheckpointError(
                f"{name}.{WEIGHT_SCALE}",
                where=self.d.path,
                got="no such tensor beside an int8 weight",
                expected="a scale for each row",
                action="Fetch or make the directory again.",
            )
        if self.d.nonzero([f"{name}.{WEIGHT_OFFSET}"]):
            return QuantType.W8A16  # the other one has no offsets
        others = Counter(kind for kind in self.labels.values() if kind in [each.value for each in _PER_ROW])
        if len(others) == 1:
            return QuantType(next(iter(others)))
        raise CheckpointError(
            f"type of {weight_name(name)}",
            where=self.d.path,
            got="int8 with a scale for each row, and no word of the description",
            expected=one_of(kind.value for kind in _PER_ROW),
            action=f'Write "model_quant_type" into {SHORT_NAME}.',
        )

    # --- what the loader takes

    def _agree(self, linears: Mapping[str, RepairedLinear]) -> None:
        """Give linears the types and the inputs that the loader takes side by side."""
        if self.target == "mindie":
            # Of experts it has another one, for which config.json has a key.
            outer = {name: linear for name, linear in linears.items() if not is_expert(name)}
            main = self._whole(outer)
            others = [each for each in outer.values() if each.kind not in (main, QuantType.FLOAT)]
            self._widen(others, "MindIE has one 8-bit type in a directory")
        for group in self.d.packed:
            members = [linears[name] for name in group.members]
            kinds = {member.kind for member in members}
            if len(kinds) > 1:
                self._settle(members, kinds)
            if len(members) > 1 and {member.kind for member in members} <= NEEDS_CALIBRATION:
                self._share(members)
        if self.target == "vllm-ascend":
            for linear in linears.values():
                offsets = f"{linear.module}.{WEIGHT_OFFSET}"
                if linear.kind is QuantType.W8A16 and self.d.nonzero([offsets]):
                    linear.centred = True
                    self.out.lose(
                        "weights are rounded anew, without offsets: vllm-ascend turns their sign", linear.module
                    )

    def _settle(self, members: list[RepairedLinear], kinds: set[QuantType]) -> None:
        """Give one type to linears that become one."""
        int8 = kinds - {QuantType.FLOAT}
        if self.target == "mindie" and int8 <= _PACKS_MIXED and len(int8) == 1:
            return  # it keeps them apart
        if QuantType.FLOAT not in kinds and all(member.has(WEIGHT_SCALE) for member in members):
            is_symmetric = not self.d.nonzero(f"{member.module}.{WEIGHT_OFFSET}" for member in members)
            if is_symmetric:
                for member in members:
                    member.kind = QuantType.W8A8_DYNAMIC
                self.out.lose("one type for q, k, v (gate, up): their inputs get a range for each token",
                              *(member.module for member in members))  # fmt: skip
                return
        self._widen([member for member in members if member.kind is not QuantType.FLOAT],
                    "q, k, v (gate, up) have one type")  # fmt: skip

    def _widen(self, linears: list[RepairedLinear], why: str) -> None:
        for linear in linears:
            linear.kind = QuantType.FLOAT
            self.out.lose(
                f"8-bit linears become {self.out.dtype.value}, rounded and twice as large: {why}", linear.module
            )

    def _share(self, members: list[RepairedLinear]) -> None:
        """Give linears that become one a range that holds what each of them has."""
        inputs = [member.inputs() for member in members]
        if not any(differ([cast(np.array([each[i]]), self.out.dtype) for each in inputs]) for i in (0, 1)):
            return
        lo = min((-128 - offset) * scale for scale, offset in inputs)
        hi = max((127 - offset) * scale for scale, offset in inputs)
        scale = rounded((hi - lo) / 255, self.out.dtype)  # as it is stored: deq_scale and input_offset are of it
        if not 0 < scale < float("inf"):
            what, got = f"range of the inputs of {members[0].module}", f"{lo:g} to {hi:g}"
            raise CheckpointError(what, where=self.d.path, got=got, expected=f"one that {self.out.dtype.value} holds")
        for member in members:
            member.common = scale, float(np.clip(np.rint(-128 - lo / scale), -128, 127))
        self.out.lose("one input_scale and input_offset for q, k, v (gate, up), of all their ranges",
                      *(member.module for member in members))  # fmt: skip

    def _whole(self, linears: Mapping[str, RepairedLinear]) -> QuantType:
        """Return the type of the whole model: what the description says, if any linear has it, else the commonest."""
        counts = Counter(linear.kind for linear in linears.values() if linear.kind is not QuantType.FLOAT)
        said = self.description.get("model_quant_type")
        if said in [kind.value for kind in counts]:
            return QuantType(said)
        kind = counts.most_common(1)[0][0] if counts else QuantType.FLOAT
        self.out.repair(f"model_quant_type is {kind.value}, and was {said or 'none'}")
        return kind

    # --- the tensors

    def _add_linear(self, linear: RepairedLinear) -> None:
        linear.require_place_for_bias()
        for suffix, (planned, tag) in linear.tensors().items():
            self._tell(linear, suffix, planned)
            self.out.tensors[planned.name] = Written(planned, tag, partial(linear.pieces, suffix, planned))

    def _tell(self, linear: RepairedLinear, suffix: str, planned: PlannedTensor) -> None:
        if not linear.has(suffix):
            linear.check(suffix)
            self.out.repair(f"{suffix} is made from what is there", linear.module)
        elif linear.keeps_numbers:
            info = self.stored.tensors[planned.name]
            if info.dtype != planned.dtype.value:
                model = self.out.dtype.value
                self.out.repair(
                    f"{suffix} is {planned.dtype.value} in a {model} model, and was {info.dtype}", linear.module
                )
            elif info.shape != planned.shape:
                self.out.repair(f"{suffix} has another shape", linear.module)

    def _add_head(self) -> None:
        """Write a head where one is stored; of a tied model vllm-ascend may look for its entry all the same."""
        name, head = self.d.model.names.head, self.d.head
        weight, is_tied = weight_name(name), self.d.model.tie_word_embeddings
        if not self.stored.has(weight):
            if not is_tied:
                self._require([weight])
            self._add_bare(weight)
            return
        if is_tied and self.stored.tensors[weight].dtype == DType.I8.value:
            self.out.repair("an 8-bit head of a tied model, which nobody reads, is left out", weight)
            self._add_bare(weight)
            return
        linear = self._linear(name, head)
        if linear.kind is QuantType.FLOAT:
            self._add_linear(linear)
        else:
            self._widen([linear], f"{self.target} reads a float head")
            self._add_linear(linear)

    def _add_bare(self, weight: str) -> None:
        if self.target == "vllm-ascend":
            self.out.bare[weight] = QuantType.FLOAT

    def _add_norms(self) -> None:
        biases: dict[str, str] = {}
        for norm, size in self.d.norms.items():
            name = weight_name(norm) if self.stored.has(weight_name(norm)) else weight_name(legacy_norm(norm))
            self._require([name])
            self.out.copy(self.stored, name, (size,), weight_name(norm))
            stored = [each for each in (bias_name(norm), bias_name(legacy_norm(norm))) if self.stored.has(each)]
            if stored:
                biases[norm] = stored[0]
        older = [name(legacy_norm(norm)) for norm in self.d.norms for name in (weight_name, bias_name)]
        if any(map(self.stored.has, older)):
            self.out.repair("norms have one name: .module is left out")
        if not self.d.nonzero(biases.values()):
            if biases:
                self.out.repair("norm biases of zeros are left out", *biases)
            return
        for norm, size in self.d.norms.items():  # vllm-ascend gives all of them one as soon as one has it
            planned = PlannedTensor(bias_name(norm), DType.F32, (size,))
            values = self.stored.values(biases[norm]) if norm in biases else np.zeros(size, np.float32)
            self.out.tensors[planned.name] = Written(planned, QuantType.FLOAT, partial(_whole, values))

    def _tell_of_the_rest(self) -> None:
        """Name what is stored and not written."""
        used = {*self.out.tensors, *self.d.norm_tensors(), *self.d.kv_tensors(), *self.d.fa_tensors()}
        head = self.d.model.names.head
        used.add(weight_name(head))
        suffixes = {spec.suffix for specs in LINEAR_TENSORS.values() for spec in specs} - {BIAS}
        used |= {f"{linear}.{suffix}" for linear in (*self.d.linears, head) for suffix in suffixes}
        left = [name for name in self.d.tensors if name not in used and not name.endswith("rotary_emb.inv_freq")]
        zero = [name for name in left if name.endswith(".bias") and not self.d.nonzero([name])]
        if zero:
            self.out.repair("biases of zeros that the model does not have are left out", *zero)
        if unknown := [name for name in left if name not in zero]:
            self.out.lose(f"tensors that {self.target} does not read are left out", *unknown)
        entries = [key for key, value in self.description.items() if isinstance(value, str) and "." in key]
        entries = [key for key in entries if not key.endswith(".quant_type") and key not in self.out.bare]
        if idle := self.d.absent(entries):
            self.out.repair("entries without a tensor are left out", *idle)
        if bare := [name for name in self.out.tensors if name in self.d.tensors and name not in self.description]:
            self.out.repair("entries are made for tensors that had none", *bare)


def _whole(values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return a tensor that is small enough to be one piece."""
    return [values]
