"""What a user asks for, and what it means for each linear of a model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from eightfold.config import DType, ModelConfig
from eightfold.errors import ConfigError
from eightfold.families import EMBEDDING, LM_HEAD, all_linears, all_norms, input_groups, layer_norms, layer_prefix
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.safetensors import PlannedTensor
from eightfold.scheme import DTypeRule, QuantType, TensorSpec, linear_tensors, weight_name


@dataclass(frozen=True)
class Recipe:
    """The choices of one quantization."""

    scheme: QuantType
    weight_symmetric: bool = True  # False only for W8A16
    keep_float: tuple[str, ...] = ()  # glob patterns on full module names
    save_float32: bool = False  # store every floating tensor as float32

    def __post_init__(self) -> None:
        if not self.weight_symmetric and self.scheme is not QuantType.W8A16:
            raise ConfigError(
                "--no-weight-symmetric",
                got=f"scheme {self.scheme.value}",
                expected="W8A16",
                action="Schemes with int8 activations need symmetric weights.",
            )


def assign_types(config: ModelConfig, recipe: Recipe) -> dict[str, QuantType]:
    """Return how each linear is going to be stored, by full module name; lm_head stays float.

    Raises:
        ConfigError: a keep-float pattern matches no linear.
    """
    linears = all_linears(config)
    kept = {LM_HEAD}
    for pattern in recipe.keep_float:
        matches = {name for name in linears if fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, linears, n=1, cutoff=0.5)
            example = near[0] if near else f"*.{input_groups(config)[-1].linears[0].name}"
            raise ConfigError(
                "--keep-float",
                got=f"{pattern!r}, which matches no linear",
                expected=f"a name or pattern such as {example!r}",
            )
        kept |= matches
    return {name: QuantType.FLOAT if name in kept else recipe.scheme for name in linears}


def split_groups(config: ModelConfig, types: dict[str, QuantType]) -> list[str]:
    """Return the groups of linears with a common input whose members are stored differently, as `layer: names`."""
    found = []
    for layer_idx in range(config.num_layers):
        for group in input_groups(config):
            kinds = {types[layer_prefix(layer_idx) + linear.name] for linear in group.linears}
            if len(kinds) > 1:
                found.append(f"layer {layer_idx}: {', '.join(linear.name for linear in group.linears)}")
    return found


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: what is planned for the file, and its entry in the description."""

    planned: PlannedTensor
    tag: QuantType


def plan_output(checkpoint: Checkpoint, recipe: Recipe, types: dict[str, QuantType]) -> dict[str, OutputTensor]:
    """Return every tensor of the output by name, in module order: embedding, layers, final norm, head."""
    model, config = checkpoint.dtype, checkpoint.config
    linears, norms = all_linears(config), all_norms(config)
    plan: dict[str, OutputTensor] = {}

    def add(name: str, rule: DTypeRule, shape: tuple[int, ...], tag: QuantType, source: str) -> None:
        stored = checkpoint.tensors.get(source)
        dtype = rule.resolve(model, DType(stored.dtype) if stored else None, recipe.save_float32)
        plan[name] = OutputTensor(PlannedTensor(name, dtype, shape), tag)

    def add_float(module: str, shape: tuple[int, ...]) -> None:
        name = weight_name(module)
        add(name, DTypeRule.SOURCE, shape, QuantType.FLOAT, checkpoint.head_weight() if module == LM_HEAD else name)

    def add_linear(module: str) -> None:
        linear = linears[module]
        for spec in linear_tensors(types[module], linear.has_bias):
            name = tensor_name(module, spec)
            add(name, spec.dtype, spec.shape_for(linear.n, linear.k), spec.tag, name)

    add_float(EMBEDDING, (config.vocab_size, config.hidden_size))
    for layer_idx in range(config.num_layers):
        prefix = layer_prefix(layer_idx)
        for group in input_groups(config):
            for linear in group.linears:
                add_linear(prefix + linear.name)
        for name in layer_norms(config):
            add_float(prefix + name, (norms[prefix + name],))
    for module in (name for name in norms if weight_name(name) not in plan):
        add_float(module, (norms[module],))
    add_float(LM_HEAD, (config.vocab_size, config.hidden_size))
    return plan


def tensor_name(module: str, spec: TensorSpec) -> str:
    """Return the full name of one of a linear's tensors."""
    return f"{module}.{spec.suffix}"
