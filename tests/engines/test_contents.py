"""What the plugin for vLLM reads of a directory, and what it refuses before vLLM makes a model. vLLM is not needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eightfold.errors import EightfoldError
from eightfold.scheme import QuantType
from eightfold_vllm.choice import choose
from eightfold_vllm.contents import IGNORED, read_contents
from tests.check import DOWN, HEADS, NORM, Change, K, Q, Toy


def refusal(path: Path) -> str:
    with pytest.raises(EightfoldError) as caught:
        read_contents(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "DIR")


def test_the_types_of_a_mixture_are_read(tmp_path):
    found = read_contents(Toy(tmp_path, modules=(("*down_proj", "w8a16"),)).keep_float(Q).path)
    assert (found.types[Q], found.types[K], found.types[DOWN], found.types["lm_head"]) == (
        QuantType.FLOAT,
        QuantType.W8A8,
        QuantType.W8A16,
        QuantType.FLOAT,
    )
    assert found.types[NORM] is QuantType.FLOAT
    assert found.stored([K]) == {
        "weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale",
    }  # fmt: skip
    assert found.stored(iter([K, Q])) == {"weight"}
    assert (found.packed, found.notes) == (True, ())
    assert not read_contents(Toy(tmp_path / "other", dtype="bfloat16").path).packed


def test_either_name_of_the_description_is_read_and_both_beside_each_other(tmp_path):
    toy = Toy(tmp_path)
    shutil.copy(toy.description, toy.path / "quant_model_description_w8a8.json")
    both = read_contents(toy.path)
    toy.description.unlink()
    assert read_contents(toy.path) == both


def test_what_vllm_leaves_out_is_said(tmp_path):
    toy = Toy(tmp_path, "w8a8-mix").add_kv_cache().add_attention()
    assert [note.split()[0:3] for note in read_contents(toy.path).notes] == [
        ["the", "int8", "key/value"],
        ["quantized", "attention", "(FAQuant)"],
        ["W8A8_MIX", "is", "computed"],
    ]
    ignored = {name.rpartition("self_attn.")[2] for name in toy.load() if IGNORED.search(name)}
    parts = [f"{linear}.kv_cache_{end}" for linear in ("k_proj", "v_proj") for end in ("scale", "offset")]
    assert ignored == {*parts, *(f"fa_{part}.{end}" for part in "qkv" for end in ("scale", "offset"))}


def test_entries_of_float_tensors_may_be_missing_and_scales_that_deq_scale_holds(tmp_path):
    toy = Toy(tmp_path).describe({f"{NORM}.weight": ..., "lm_head.weight": ...})
    scales = [name for name in toy.load() if name.endswith((".weight_scale", ".weight_offset"))]
    found = read_contents(toy.remove(*scales).path)
    assert "weight_scale" not in found.stored([Q]) and "deq_scale" in found.stored([Q])


@pytest.mark.parametrize("older", [False, True], ids=["own", "older"])
def test_zero_biases_of_norms_say_nothing(tmp_path, older):
    read_contents(Toy(tmp_path).add_norm_biases(older=older).path)


def label(name: str, kind: str) -> Change:
    return lambda toy: toy.describe({name: kind})


REFUSED: dict[str, tuple[Change, str]] = {
    "a type without a product": (
        label(f"{Q}.weight", "W4A8_DYNAMIC"),
        "type of 1 weights in DIR/quant_model_description.json: got W4A8_DYNAMIC",
    ),
    "an int8 weight that is said to be float": (label(f"{Q}.weight", "FLOAT"), f"got {Q}.weight: FLOAT over I8"),
    "a float weight that is said to be int8": (label("lm_head.weight", "W8A8"), "got lm_head.weight: W8A8 over "),
    "no scale": (
        lambda toy: toy.remove(f"{Q}.weight_scale", f"{Q}.deq_scale"),
        f"1 tensor is missing in DIR: got none of the name {Q}.weight_scale",
    ),
    "no zero point": (lambda toy: toy.remove(f"{Q}.input_offset"), f"got none of the name {Q}.input_offset"),
    "an offset of a weight": (
        lambda toy: toy.change({f"{Q}.weight_offset": torch.ones(HEADS * 12, 1)}),
        f"offsets of weights that meet int8 inputs in DIR: got values other than zero ({Q}.weight_offset)",
    ),
    "a shift behind a norm": (
        lambda toy: toy.add_norm_biases(0.5),
        "biases of norms in DIR: got values other than zero",
    ),
    "no description": (lambda toy: toy.description.unlink(), "description in DIR: got none"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_vllm_cannot_compute_is_refused(tmp_path, title):
    change, message = REFUSED[title]
    toy = Toy(tmp_path)
    change(toy)
    assert message in refusal(toy.path)


def arguments(path: Path, **others: object) -> SimpleNamespace:
    return SimpleNamespace(**{"model": str(path), "revision": None, "quantization": None, "hf_overrides": {}, **others})


def test_a_directory_with_a_description_chooses_the_method_and_no_other_does(tmp_path, float_model):
    toy = Toy(tmp_path)
    for path, chosen in ((toy.path, "eightfold"), (float_model, None), (Path("org/name"), None)):
        given = arguments(path)
        choose(given)
        assert (given.quantization, given.hf_overrides) == (chosen, {})
    given = arguments(toy.path, quantization="fp8")
    choose(given)
    assert given.quantization == "fp8"


def test_settings_of_older_mindie_in_config_json_do_not_stand_in_the_way(tmp_path):
    toy = Toy(tmp_path).configure(quantization_config={"kv_quant_type": None})
    given = arguments(toy.path, hf_overrides={"rope_theta": 1e6})
    choose(given)
    assert given.quantization == "eightfold"
    assert given.hf_overrides == {"rope_theta": 1e6, "quantization_config": {"quant_method": "eightfold"}}
    given = arguments(toy.configure(quantization_config={"quant_method": "compressed-tensors"}).path)
    choose(given)
    assert (given.quantization, given.hf_overrides) == (None, {})


def test_the_plugin_loads_nothing_and_yields_to_vllm_ascend(tmp_path):
    code = (
        "import sys; sys.modules['vllm'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import eightfold_vllm\n"
        "assert not {'eightfold', 'torch', 'numpy'} & set(sys.modules)\n"
        "eightfold_vllm.register()\n"
        "print('eightfold_vllm.choice' in sys.modules)\n"
    )
    (tmp_path / "vllm_ascend.py").touch()
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
