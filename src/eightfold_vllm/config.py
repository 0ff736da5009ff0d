"""The quantization method as vLLM knows it: which of its modules gets which product.

vLLM joins linears that share an input (q, k, v; gate and up), so the parts have to have one type. It makes the model
before it loads a weight, and what does not fit is refused then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from eightfold.errors import CheckpointError, UnsupportedError, shortlist
from eightfold.layouts import EXPERT
from eightfold.scheme import WEIGHT, QuantType, weight_name
from eightfold_vllm import NAME
from eightfold_vllm.choice import local_directory
from eightfold_vllm.contents import IGNORED, Contents, read_contents

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(f"vllm.{__name__}")


class EightfoldConfig(QuantizationConfig):
    """Directories in the layout of msModelSlim and MindIE, as `eightfold quantize` writes them.

    Attributes:
        contents: what the directory holds; None until maybe_update_config().
        types: the type of each module that has a weight, by vLLM's name for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contents: Contents | None = None
        self.types: dict[str, QuantType] = {}
        self.origin: dict[str, str] = {}  # vLLM's name of a module -> that in the directory

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # int8 products of NVIDIA GPUs: Turing

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: there may be two names of the description beside each other, and the headers are read too."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EightfoldConfig:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the directory. It has to lie on this machine, whole.

        Raises:
            EightfoldError: see read_contents().
        """
        directory = local_directory(model_name, revision)
        if directory is None:
            raise CheckpointError(
                f"no model {model_name} on this machine",
                action="Fetch it first: `hf download`, or give its directory.",
            )
        self._take(read_contents(directory))

    def _take(self, contents: Contents) -> None:
        for note in contents.notes:
            logger.warning_once("Eightfold: %s.", note)
        self.contents = contents
        self.types = dict(contents.types)
        self.origin = {module: module for module in self.types}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow a model whose modules vLLM calls otherwise than the files do."""
        for module in list(self.types):
            name = hf_to_vllm_mapper.map_name(weight_name(module))
            if name is not None and name.endswith(f".{WEIGHT}"):
                renamed = name.removesuffix(f".{WEIGHT}")
                self.types[renamed], self.origin[renamed] = self.types[module], self.origin[module]

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={IGNORED: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a module computes; None for what has no weight that is quantized here.

        Raises:
            CheckpointError: no such linear in the directory.
            UnsupportedError: linears that vLLM joins have different types, or no kernel takes these experts.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from eightfold_vllm.experts import experts_method
        from eightfold_vllm.linear import EightfoldLinearMethod

        if isinstance(layer, RoutedExperts):
            return experts_method(self, layer, prefix)
        is_head = isinstance(layer, ParallelLMHead)
        if not isinstance(layer, LinearBase) and not is_head:
            return None
        parts = [prefix] if is_head else self.parts_of(prefix)
        kind = self.types.get(prefix, QuantType.FLOAT) if is_head else self.type_of(parts)
        if kind is QuantType.FLOAT:
            return None if is_head else UnquantizedLinearMethod()
        assert self.contents is not None
        return EightfoldLinearMethod(
            kind, self.contents.stored(self.origin[part] for part in parts), self.contents.packed
        )

    def parts_of(self, prefix: str) -> list[str]:
        """Return the linears that are one module in vLLM."""
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(last, [last])]

    def type_of(self, parts: Iterable[str]) -> QuantType:
        """Return the type that linears have in common."""
        assert self.contents is not None
        types = {part: self.types.get(part) for part in parts}
        if None in types.values():
            absent = [part for part, kind in types.items() if kind is None]
            raise CheckpointError(
                f"linear {shortlist(absent, 3)}",
                where=self.contents.path,
                got="no weight of this name",
                expected="one, as vLLM's model has it",
                action="This version of vLLM may name the family's linears otherwise; "
                "`eightfold export --to compressed-tensors` may help.",
            )
        if len(set(types.values())) > 1:
            raise UnsupportedError(
                "linears that vLLM joins",
                where=self.contents.path,
                got=shortlist(f"{part} {kind.value}" for part, kind in types.items() if kind),
                expected="one type for all of them",
                action="Quantize again with the same type for these, or keep all of them float (`--keep-float`).",
            )
        return next(kind for kind in types.values() if kind)

    def experts_of(self, prefix: str) -> dict[str, QuantType]:
        """Return the types of the linears of a layer's experts, by module."""
        return {name: kind for name, kind in self.types.items() if (m := EXPERT.fullmatch(name)) and m[1] == prefix}


def register_config() -> None:
    """Make the method known under its name. The class stands in a module, as vLLM's workers unpickle it."""
    register_quantization_config(NAME)(EightfoldConfig)
