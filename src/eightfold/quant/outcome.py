"""What a quantization did: for the user's terminal, and for eightfold_report.json in the output."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eightfold import __version__
from eightfold.config import DType, ModelConfig
from eightfold.families import input_groups, layer_of
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.target import REPORT_NAME as REPORT_NAME
from eightfold.layouts import EXPERT
from eightfold.quant.analysis import InputRange
from eightfold.quant.mixture import expert_notes
from eightfold.quant.plan import RolledBack
from eightfold.quant.recipe import Recipe, Samples
from eightfold.quant.recipe_file import recipe_content
from eightfold.scheme import QuantType

# Above this share of keys outside the cache's range the user is warned.
CLIPPED_LIMIT = 0.001


def samples_facts(samples: Samples) -> dict[str, Any]:
    """Return how much calibration data there is, and a digest of its token ids."""
    text = json.dumps([list(sample) for sample in samples])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"samples": len(samples), "tokens": sum(map(len, samples)), "token_ids_sha256": digest}


@dataclass
class Smoothing:
    """What outlier suppression did."""

    choices: dict[str, str] = field(default_factory=dict)  # layer and group -> what was chosen
    max_logit_difference: float = 0.0  # float model before and after, on the first sample
    max_logit: float = 0.0


@dataclass(frozen=True)
class Proof:
    """The distance of a model from its float original on held-out samples.

    Attributes:
        kl: mean KL divergence in nats.
        top1: share of positions with the same likeliest token.
        tokens: positions.
    """

    kl: float
    top1: float
    tokens: int


@dataclass
class Outcome:
    """What a quantization did."""

    recipe: Recipe
    types: Mapping[str, QuantType]  # of every linear
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was calibrated on, by its name in a report
    tensors: int = 0
    nbytes: int = 0  # of tensor data written
    rolled_back: list[RolledBack] = field(default_factory=list)
    attention_float: list[int] = field(default_factory=list)  # layers that fa_amp took FAQuant from
    stretch_scores: dict[int, float] = field(default_factory=dict)
    smoothing: Smoothing | None = None
    ranges: list[InputRange] = field(default_factory=list)  # of inputs, where they are asked for; not in the report
    clipped_keys: int = 0
    keys: int = 0
    idle_experts: dict[int, list[int]] = field(default_factory=dict)  # by layer, those that no token passed through
    proof: Proof | None = None  # where a limit of the loss was asked for
    notes: list[str] = field(default_factory=list)  # for the user, one line each
    layers: int = 0  # of the model
    layers_resumed: int = 0  # so many an earlier run had finished; like what follows, not in the report
    already_complete: bool = False  # nothing was written
    restarted: str = ""  # why what an earlier run had finished was of no use

    @property
    def quantized(self) -> int:
        """How many linears are int8."""
        return sum(kind is not QuantType.FLOAT for kind in self.types.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many linears have each type, the recipe's scheme first."""
        kinds = sorted(self.types.values(), key=lambda kind: kind is not self.recipe.scheme)
        return {kind.value: count for kind, count in Counter(kinds).items()}

    @property
    def kept_float(self) -> list[str]:
        """The linears of the layers that are not."""
        return [name for name, kind in self.types.items() if kind is QuantType.FLOAT and layer_of(name) is not None]

    def add_clipping_note(self) -> None:
        """Say what share of the keys an int8 cache cuts off whose range was taken before RoPE."""
        if not self.keys:
            return
        share = self.clipped_keys / self.keys
        advice = (
            "warning: many keys lie outside the cache's range; --kv-observe post-rope avoids that."
            if share > CLIPPED_LIMIT
            else "they were observed before RoPE, as msModelSlim does."
        )
        self.notes.append(f"{share:.4%} of the calibration keys are clipped in the int8 cache: {advice}")

    def report(self) -> dict[str, Any]:
        """Return the content of the report: the same for the same source, recipe and data."""
        content: dict[str, Any] = {
            "eightfold": __version__,
            "recipe": recipe_content(self.recipe),
            "linears": {"quantized": self.quantized, "float": self.kept_float},
        }
        content.update(self.samples)
        if self.smoothing is not None:
            content["anti_outlier"] = {
                "max_logit_difference": self.smoothing.max_logit_difference,
                "max_logit": self.smoothing.max_logit,
                "choices": self.smoothing.choices,
            }
        if self.rolled_back:
            content["rolled_back"] = [
                {"linear": row.module, "range_over_std": row.range_param, "only_with_its_group": row.of_group}
                for row in self.rolled_back
            ]
        if self.stretch_scores:
            content["attention"] = {
                "float_layers": self.attention_float,
                "stretch_scores": {str(layer_idx): score for layer_idx, score in self.stretch_scores.items()},
            }
        if self.keys:
            content["kv_cache"] = {"clipped_keys": self.clipped_keys, "keys": self.keys}
        if self.proof is not None:
            content["held_out"] = {"kl": self.proof.kl, "top1": self.proof.top1, "tokens": self.proof.tokens}
        if self.idle_experts:
            content["idle_experts"] = {str(layer_idx): idle for layer_idx, idle in self.idle_experts.items() if idle}
        content["notes"] = self.notes
        return content


def notes_for(checkpoint: Checkpoint, recipe: Recipe, types: Mapping[str, QuantType]) -> list[str]:
    """Return what a user should know about a recipe on a model, one line each."""
    config, notes = checkpoint.config, []
    if recipe.dtype_of(checkpoint.dtype) is DType.F32:
        notes.append("OUT is a float32 model, which MindIE refuses: --dtype bf16 or fp16 makes one that it takes.")
    if split := _split_groups(config, types):
        notes.append(
            f"{len(split)} groups of linears that share an input are stored in two ways (such as {split[0]}): "
            "vllm-ascend refuses that, MindIE takes it only with W8A8. Keep whole groups float."
        )
    notes += expert_notes(recipe, types)
    if all(kind is QuantType.FLOAT for kind in types.values()):
        notes.append("every linear is kept float: nothing is quantized.")
    if config.architecture == "LlamaForCausalLM" and config.head_dim * config.num_heads != config.hidden_size:
        notes.append(
            f"head_dim is {config.head_dim} and not hidden_size / heads, which MindIE takes for Llama: "
            "it would misread OUT."
        )
    if not recipe.weight_symmetric:
        notes.append("asymmetric W8A16: MindIE reads it rightly, vllm-ascend drops the sign of the offset.")
    if recipe.fa_quant and recipe.scheme is not QuantType.W8A8:
        notes.append(f"FAQuant with {recipe.scheme.value}: MindIE takes it only with W8A8.")
    if recipe.kv_int8 and not recipe.kv_symmetric:
        notes.append("an int8 cache with offsets: MindIE and vllm-ascend read only symmetric ones rightly.")
    if recipe.quantize_lm_head:
        notes.append("lm_head is quantized: try OUT in your loader first, its sources do not promise to read that.")
    if config.tie_word_embeddings and (recipe.quantize_lm_head or recipe.rotates):
        kind = "int8" if recipe.quantize_lm_head else "rotated"
        notes.append(f'the model is tied; OUT is not (config.json: "tie_word_embeddings": false), for its {kind} head.')
    if recipe.anti_outlier is not None and config.norm_places == "after":
        left = (
            "v_proj with o_proj and up_proj with down_proj" if recipe.anti_outlier.smooths_linear_pairs else "nothing"
        )
        notes.append(
            f"{config.architecture} has no norm before q, k, v, gate and up, which could take their outliers: "
            f"{recipe.anti_outlier.value} smooths {left}."
        )
    return notes


def _split_groups(config: ModelConfig, types: Mapping[str, QuantType]) -> list[str]:
    """Return the groups that are joined, by a common input or as experts, and stored differently, as `layer: names`."""
    experts: dict[str, set[QuantType]] = {}
    for name, kind in types.items():
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1], set()).add(kind)
    return [name for name, kinds in experts.items() if len(kinds) > 1] + [
        f"layer {layer_idx}: {', '.join(linear.name for linear in group.linears)}"
        for layer_idx in range(config.num_layers)
        for group in input_groups(config, layer_idx)
        if len({types[config.names.layer(layer_idx) + linear.name] for linear in group.linears}) > 1
    ]
