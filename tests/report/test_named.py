"""What is told of a directory that other engines run, from its headers and its description alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eightfold.architectures import KNOWN
from eightfold.format.named import NamedDirectory
from eightfold.report.named import describe_named
from tests.quant.families import save_random
from tests.quant.named import config_of, quantize, save, tensors_of
from tests.refusal import error_line


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("Glm4Moe", tmp_path_factory.mktemp("named") / "glm")


def test_parts_by_type_with_all_bytes(cli, tmp_path, source):
    tensors = tensors_of(source)
    behind = {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items() if "layers.1." in name}
    save(tmp_path / "m", {**tensors, **behind}, config_of(source))
    quantize(tmp_path / "m", tmp_path / "out", keep_float=("*.layers.0.self_attn.o_proj",))
    found = describe_named(NamedDirectory.open(tmp_path / "out"))
    made = tensors_of(tmp_path / "out")
    assert found.nbytes == sum(part.nbytes for part in found.parts) == sum(t.nbytes for t in made.values())
    assert {(p.name, p.scheme, p.dtype): p.count for p in found.parts} == {
        ("attention", "W8A8_DYNAMIC", "I8"): 7,
        ("attention", "FLOAT", "BF16"): 1,
        ("dense FFN", "FLOAT", "BF16"): 3,
        ("expert", "W8A8_DYNAMIC", "I8"): 12,
        ("shared expert", "FLOAT", "BF16"): 3,
        ("router", "FLOAT", "BF16"): 1,
        ("others in the layers", "FLOAT", "BF16"): sum("layernorm" in name for name in tensors),
        ("behind the last layer", "FLOAT", "BF16"): len(behind),
        ("outside the layers", "FLOAT", "BF16"): 3,
    }
    shown = cli("inspect", tmp_path / "out")
    assert shown.code == 0
    assert "Glm4MoeForCausalLM, glm4_moe, 2 layers, bfloat16" in shown.out
    assert "engines  vllm-ascend, SGLang; eightfold does not run this family" in shown.out
    assert json.loads(cli("inspect", source, "--json").out)["scheme"] == "FLOAT"


def test_no_command_runs_it_and_each_says_who_does(cli, tmp_path, source):
    quantize(source, tmp_path / "known")
    save(tmp_path / "m", tensors_of(source), {**config_of(source), "architectures": ["NewForCausalLM"]})
    quantize(tmp_path / "m", tmp_path / "unknown", generic=True)
    for name, architecture, engines in (
        ("known", "Glm4MoeForCausalLM", "vllm-ascend, SGLang"),
        ("unknown", "NewForCausalLM", "loaders of Llama-shaped models"),
    ):
        for command in (["run", "--prompt", "x"], ["eval"], ["bench"], ["serve"], ["chat"]):
            assert error_line(cli(command[0], tmp_path / name, *command[1:])) == (
                f"model in {tmp_path / name}: got an 8-bit {architecture}, which was made for other engines "
                f"({engines}), expected {KNOWN}. eightfold checks it, and does not run it."
            )
        assert f"engines  {engines}; " in cli("inspect", tmp_path / name).out
