"""`eightfold quantize` from the command line to a directory that runs."""

from __future__ import annotations

import json

import pytest

from tests.conftest import FAMILIES, tiny_config, write_model


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_and_scheme_quantizes_and_runs(cli, tmp_path, architecture, scheme):
    source = write_model(tmp_path / "float", tiny_config(architecture))
    made = cli("quantize", source, tmp_path / "out", "--scheme", scheme, "--calib-limit", 4)
    assert made.code == 0, made.err
    for backend in ("native", "reference"):
        words = ("--prompt", "hello", "--max-new-tokens", 5, "--json", "--backend", backend)
        ran = cli("run", tmp_path / "out", *words)
        assert ran.code == 0, ran.err
        document = ran.json()
        assert set(document) == {
            "text", "token_ids", "prompt_tokens", "finish_reason", "seconds", "backend", "world_size",
            "resident_weights_mib",
        }  # fmt: skip
        assert document["prompt_tokens"] == 5
        assert document["backend"] == backend


def test_description_names_every_tensor_once(cli, tmp_path, float_model):
    assert cli("quantize", float_model, tmp_path / "out", "--scheme", "w8a16").code == 0
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["version"] == "1.0.0"
    assert description["model_quant_type"] == "W8A16"
    assert description["lm_head.weight"] == "FLOAT"
    assert description["model.layers.1.mlp.down_proj.weight_scale"] == "W8A16"
