"""Rules by names alone, on small directories of families that eightfold does not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.check import by_name
from eightfold.format.named import NamedDirectory
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.quant.families import save_random

DESCRIPTION = "quant_model_description.json"


class Made:
    """A quantized directory, to be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = next(path.glob("*.safetensors"))

    def label(self, **labels: str | None) -> None:
        """Change entries whose names end so, with _ for a dot; None removes them."""
        file = self.path / DESCRIPTION
        content = json.loads(file.read_text())
        for end, label in labels.items():
            for name in [name for name in content if name.endswith(end.replace("__", "."))]:
                del content[name]
                if label is not None:
                    content[name] = label
        file.write_text(json.dumps(content))

    def configure(self, **values: Any) -> None:
        file = self.path / "config.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        stored = load_file(self.weights)
        change(stored)
        self.weights.chmod(0o600)
        save_file(stored, self.weights)

    def rules(self, loader: str) -> dict[str, str]:
        """Return what is found: rule -> verdict."""
        report = by_name.check(NamedDirectory.open(self.path), loader)
        return {finding.rule.removeprefix(f"{loader}."): finding.verdict.value for finding in report.findings}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return lambda name: root / name if (root / name).exists() else save_random(name, root / name)


@pytest.fixture
def made(tmp_path, saved):
    """A function that quantizes a family's random model."""

    def make(name: str, scheme: QuantType = QuantType.W8A8_DYNAMIC, **options: Any) -> Made:
        quantize_by_name(plan_by_name(saved(name), Recipe(scheme, **options)), tmp_path / "out", overwrite=True)
        return Made(tmp_path / "out")

    return make


def test_nothing_is_wrong_with_what_is_made(made):
    for name in ("Qwen3Moe", "DeepseekV3"):
        assert [made(name).rules(loader) for loader in by_name.LOADERS] == [{}, {}, {}, {}]


def test_experts_in_w8a16_load_in_mindie_alone(made):
    out = made("Qwen3Moe", QuantType.W8A16, modules=(("*.experts.*", QuantType.W8A16),))
    assert out.rules("mindie") == {}
    assert out.rules("vllm-ascend") == {"scheme-experts": "refuses"}
    assert out.rules("sglang") == {"scheme": "refuses", "scheme-experts": "refuses"}
    assert out.rules("mindie-aclgraph") == {"scheme-experts": "refuses", "scheme": "misdecodes"}


def test_two_schemes_are_one_to_mindie(made):
    out = made("Qwen3Moe", QuantType.W8A16)
    assert out.rules("mindie") == {"one-scheme": "misdecodes"}
    assert out.rules("vllm-ascend") == {}


def test_one_float_expert_among_others(made):
    out = made("Mixtral", keep_float=("*.layers.1.*.experts.2.*",))
    assert out.rules("vllm-ascend") == {"mixed-experts": "misdecodes"}
    assert out.rules("sglang")["mixed-experts"] == "misdecodes"


def test_groups_that_are_stored_in_two_ways(made):
    assert made("DeepseekV3", keep_float=("*.q_a_proj",)).rules("vllm-ascend") == {"mixed-group": "refuses"}
    assert made("DeepseekV3", modules=(("*.kv_b_proj", QuantType.W8A8_DYNAMIC),)).rules("vllm-ascend") == {
        "kv-b": "refuses"
    }


@pytest.mark.parametrize(
    ("name", "changes", "loader", "found"),
    [
        ("Mixtral", {"experts__weight": None}, "vllm-ascend", {"entry": "refuses"}),
        ("Mixtral", {"experts__weight": None}, "sglang", {}),
        ("Mixtral", {"q_proj__weight_scale": None}, "sglang", {"label-missing": "refuses"}),
        ("Qwen3Moe", {"o_proj__weight": "FLOAT"}, "vllm-ascend", {"label-and-weight": "misdecodes"}),
        ("Qwen3Moe", {"o_proj__weight": "W4A8"}, "vllm-ascend", {"scheme": "refuses"}),
        ("Mixtral", {"lm_head__weight": None}, "vllm-ascend", {"label-missing": "refuses", "head-entry": "warns"}),
    ],
)
def test_labels(made, name, changes, loader, found):
    out = made(name)
    out.label(**changes)
    assert out.rules(loader) == found


def test_tensors_that_are_missing_or_of_another_shape(made):
    out, scale = made("Qwen3Moe"), "model.layers.1.self_attn.q_proj.weight_scale"
    out.tensors(lambda stored: stored.update({scale: torch.ones(7, 1)}))
    assert out.rules("vllm-ascend") == {"shape": "refuses"}
    out.tensors(lambda stored: stored.pop(scale))
    assert out.rules("vllm-ascend") == {"missing-tensor": "refuses", "entry-without-tensor": "ignores"}


def test_static_inputs_that_are_joined_and_not_equal(saved, tmp_path):
    samples = [[1, 2, 3], [4, 5]]
    quantize_checkpoint(saved("Qwen2Moe"), tmp_path / "out", Recipe(QuantType.W8A8), samples)
    out, name = Made(tmp_path / "out"), "model.layers.1.self_attn.k_proj.input_scale"
    assert [out.rules(loader) for loader in by_name.LOADERS] == [{}, {"family": "warns"}, {}, {}]
    out.tensors(lambda stored: stored.update({name: 2 * stored[name]}))
    assert out.rules("mindie") == {"inputs": "refuses"}
    assert out.rules("vllm-ascend") == out.rules("sglang") == {"inputs": "misdecodes"}


def test_the_config(made):
    out = made("Qwen3Moe")
    out.configure(attn_quantize=None)
    assert out.rules("mindie") == {"config-key": "misdecodes"}
    out.configure(attn_quantize="w8a8_dynamic", vision_config={"quantization_config": {}})
    assert out.rules("vllm-ascend") == {"quantization-config": "refuses"}
    (out.path / DESCRIPTION).rename(out.path / "quant_model_description_w8a8_dynamic.json")
    assert "description" in out.rules("sglang")
    assert out.rules("mindie") == {}


def test_keys_that_switch_biases_of_norms_on(made):
    out = made("DeepseekV32")
    assert out.rules("sglang") == out.rules("vllm-ascend") == {"norm-bias": "warns"}
    assert out.rules("mindie") == {"family": "warns"}


def test_a_joined_gate_and_up(made, saved):
    out = made("Glm4")
    content = json.loads((out.path / DESCRIPTION).read_text())
    content["model.layers.0.mlp.gate_up_proj.weight"] = "W8A8_DYNAMIC"
    (out.path / DESCRIPTION).write_text(json.dumps(content))
    assert out.rules("vllm-ascend") == {"joined": "refuses", "entry-without-tensor": "ignores"}


def test_the_command(cli, made, saved):
    out = made("Mixtral")
    done = cli("check", out.path, "--json")
    assert done.code == 0
    reports = json.loads(done.out)["reports"]
    assert [report["loader"] for report in reports] == list(by_name.LOADERS)
    assert reports[2]["summary"]["packs"] == {"experts": {"W8A8_DYNAMIC": 2}}
    out.label(experts__weight=None)
    done = cli("check", out.path, "--for", "vllm-ascend")
    assert done.code == 1
    assert "does not know of which parts this consists, and looks this entry up" in done.out
    assert cli("check", saved("Mixtral"), "--for", "sglang").code == 0
