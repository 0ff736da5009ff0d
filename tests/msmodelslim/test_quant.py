"""`msmodelslim quant`: the settings it takes for a model and a type, practice files, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eightfold.errors import UnsupportedError
from eightfold.msmodelslim.__main__ import main
from eightfold.msmodelslim.known import ALL_TYPES, known_practice
from eightfold.msmodelslim.practice import read_practice
from tests.conftest import Result

V1 = """
apiversion: modelslim_v1
metadata: {config_id: own, label: {w_bit: 8}}
spec:
  process:
    - type: iter_smooth
      scale_min: 1e-5
      include: ["*"]
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: False, method: histogram}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
      exclude: ["*.down_proj"]
    - type: dynamic_cache
      qconfig: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
  save: [{type: ascendv1_saver, part_file_size: 4}]
  dataset: own.jsonl
"""

V0 = """
apiversion: modelslim_v0
spec:
  anti_cfg: {anti_method: m4}
  calib_cfg: {w_bit: 8, a_bit: 8, mm_tensor: False, pdmix: True, act_method: 2, disable_names: [lm_head]}
  calib_params: {disable_level: L1}
  calib_dataset: mix_calib.jsonl
"""

GROUP = """
apiversion: modelslim_v1
spec:
  process:
    - type: group
      configs:
        - type: linear_quant
          qconfig: {act: {scope: per_token, dtype: int8, symmetric: True}, weight: {dtype: int8}}
          include: ["*self_attn*"]
          exclude: ["*.o_proj"]
        - type: linear_quant
          qconfig: {weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}}
          include: ["*mlp*"]
"""


@pytest.fixture
def slim(monkeypatch, capsys):
    """Run `msmodelslim ARGS` in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["msmodelslim", *map(str, words)])
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def described(directory: Path) -> dict[str, str]:
    return json.loads((directory / "quant_model_description.json").read_text())


def test_the_command_of_the_documents_takes_the_models_own_settings(slim, tmp_path, float_model):
    out = tmp_path / "out"
    words = ("--model_path", float_model, "--save_path", out, "--device", "npu", "--model_type", "Qwen2.5-7B-Instruct")
    made = slim("quant", *words, "--quant_type", "w8a8", "--trust_remote_code", "True")
    assert made.code == 0, made.err
    found = described(out)
    assert found["model.layers.0.self_attn.q_proj.weight"] == "W8A8"
    assert found["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    assert "note: --trust_remote_code changes nothing" in made.err
    assert f"note: eightfold quantize {float_model} {out} --scheme w8a8 --anti-outlier none" in made.err
    report = json.loads((out / "eightfold_report.json").read_text())
    assert report["recipe"]["act_method"] == "minmax"


def test_other_models_take_the_settings_for_any(slim, tmp_path, float_model):
    words = (
        "--model_path",
        float_model,
        "--save_path",
        tmp_path / "out",
        "--tag",
        "MindIE",
        "x",
        "--device",
        "npu:0,1",
    )
    made = slim("quant", *words)
    assert made.code == 0, made.err
    assert described(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    assert f"note: msModelSlim has no settings of its own for {float_model.name}" in made.err
    assert "torchrun shares the work" in made.err


def test_a_practice_is_read_as_it_stands(tmp_path):
    path = tmp_path / "practice.yaml"
    path.write_text(V1)
    found = read_practice(path)
    assert " ".join(found.words()) == (
        "--scheme w8a8 --anti-outlier iter --keep-float *.down_proj --act-method histogram --kv-int8 "
        "--kv-observe pre-rope --part-size-gb 4"
    )
    assert found.dataset == "own.jsonl"
    path.write_text(V0)
    found = read_practice(path)
    assert " ".join(found.words()) == (
        "--scheme w8a8-mix --anti-outlier m4 --keep-float lm_head --act-method 2 --disable-level L1"
    )


def test_a_practice_of_several_types_goes_by_modules(slim, tmp_path, float_model):
    (tmp_path / "practice.yaml").write_text(GROUP)
    paths = ("--model_path", float_model, "--save_path", tmp_path / "out", "--config_path", tmp_path / "practice.yaml")
    made = slim("quant", *paths, "--device", "cpu")
    assert made.code == 0, made.err
    found = described(tmp_path / "out")
    kinds = {name: found[f"model.layers.1.{name}.weight"] for name in ("self_attn.q_proj", "self_attn.o_proj")}
    assert kinds == {"self_attn.q_proj": "W8A8_DYNAMIC", "self_attn.o_proj": "FLOAT"}
    assert found["model.layers.1.mlp.up_proj.weight"] == "W8A16"


@pytest.mark.parametrize(
    ("text", "change", "expected"),
    [
        (V1, ("iter_smooth", "quarot"), "processor of a practice.*got 'quarot', expected iter_smooth, flex"),
        (V1, ("scale_min: 1e-5", "alpha: 0.5"), "alpha of iter_smooth of a practice.*got 0.5, expected its default"),
        (V1, ("act: {scope: per_tensor, dtype: int8, symmetric: False", "act: {scope: per_tensor, dtype: int8"), None),
        (V1, ("symmetric: False", "symmetric: True"), "symmetric of per_tensor.*got True, expected False"),
        (V1, ("dtype: int8, symmetric: False", "dtype: mxfp8, symmetric: False"), "act dtype.*got 'mxfp8'"),
        (V1, ("ascendv1_saver", "mindie_format_saver"), "save of a practice.*got 'mindie_format_saver'"),
        (V1, ("modelslim_v1", "multimodal_sd_modelslim_v1"), "apiversion of a practice"),
        (V0, ("mm_tensor: False", "co_sparse: True"), "co_sparse of a practice.*sparse and low-bit weights"),
        (V0, ("w_bit: 8", "w_bit: 4"), "w_bit of a practice.*got 4, expected 8"),
        (V0, ("pdmix: True", "flex: 1"), "calib_cfg of a practice.*got 'flex'"),
    ],
)
def test_what_has_no_equal_here_is_refused_by_its_name(tmp_path, text, change, expected):
    path = tmp_path / "practice.yaml"
    assert change[0] in text
    path.write_text(text.replace(*change))
    if expected is None:
        assert read_practice(path).scheme == "w8a8"
        return
    with pytest.raises(UnsupportedError, match=expected):
        read_practice(path)


def test_types_are_made_or_refused_with_the_reason():
    for name in ALL_TYPES:
        if name in ("w8a8", "w8a16"):
            assert not known_practice("Own-7B", name)[1]
        else:
            with pytest.raises(UnsupportedError, match=r"--quant_type"):
                known_practice("Own-7B", name)
    assert "--kv-int8" in known_practice("Qwen2-72B", "w8a8c8")[0].options
    with pytest.raises(UnsupportedError, match=r"got w8a8s, expected .*Sparse weights are not made"):
        known_practice("Qwen2-7B", "w8a8s")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("quant", "--save_path", "x"), "msmodelslim: --model_path: got none"),
        (("quant", "--model_path", "x", "--save_path", "y", "--trust_remote_code", "yes"), "got yes, expected True or"),
        (("quant", "--model_path", "x", "--save_path", "y", "--device", "gpu"), "--device: got gpu, expected npu"),
        (("tune", "--config", "x"), "msmodelslim tune: expected quant"),
        (("analyze", "linear"), "Run: eightfold analyze"),
        (("quantise",), "command: got quantise, expected quant"),
    ],
)
def test_wrong_words_get_one_line(slim, words, expected):
    result = slim(*words)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert expected in result.err


def test_a_practice_of_another_form_gets_one_line(slim, tmp_path):
    path = tmp_path / "practice.yaml"
    path.write_text("apiversion: modelslim_v1\nspec: {process: [{type: linear_quant, qconfig: [1]}]}\n")
    result = slim("quant", "--model_path", "x", "--save_path", "y", "--config_path", path)
    assert result.code == 2
    assert result.err.startswith("msmodelslim: practice in ")
