"""A GGUF file in Q8_0 becomes an 8-bit directory: its own integers where a row has one scale, new ones elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eightfold.exporters import ExportOptions, plan_export
from eightfold.format.checkpoint import Checkpoint
from eightfold.importers import ImportOptions, importer_of
from eightfold.model.reference.load import Decoder
from eightfold.progress import silent
from eightfold.scheme import SCHEMES, QuantType
from tests.refusal import refused

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from tests.exporters.test_gguf import FAMILIES, quantized, stored  # noqa: E402
from tests.importers.gguf_source import Q8_0, Source, float_config  # noqa: E402


def convert(source: Path, target: Path) -> str:
    return importer_of(source).convert(source, target, ImportOptions(scheme=SCHEMES["w8a16"]))


def rows_of_one_scale(made: Source) -> int:
    """Count the rows of linears in which all blocks happen to have the same scale."""
    raw = [
        raw.reshape(len(raw), -1, 34) for name, (raw, kind) in made.tensors.items() if "blk" in name and kind is Q8_0
    ]
    return sum(int((blocks[:, :1, :2] == blocks[..., :2]).all((1, 2)).sum()) for blocks in raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_export_has_written_comes_back_byte_for_byte(tmp_path, family):
    out = quantized(tmp_path, family, changes={"tie_word_embeddings": family == "qwen3"})
    plan_export(out, "gguf", ExportOptions(), lossy=False).write(tmp_path / "x.gguf", overwrite=False, progress=silent)
    made = convert(tmp_path / "x.gguf", tmp_path / "back")
    assert made.startswith("14 linears as W8A16, 1152 of 1152 rows keep their integers, ")
    before, after = stored(out), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.half().float() if name.endswith("_scale") else tensor
        assert after[name].dtype == expected.dtype, name
        assert torch.equal(after[name], expected), name
    ours, theirs = (Checkpoint.open(path) for path in (out, tmp_path / "back"))
    assert ours.description is not None
    assert theirs.description is not None
    assert ours.description.tags == theirs.description.tags


def test_a_second_round_gives_the_same_bytes(tmp_path):
    made = Source(float_config(torch_dtype="bfloat16"), kind=Q8_0)
    convert(made.write(tmp_path / "x.gguf"), tmp_path / "first")
    planned = plan_export(tmp_path / "first", "gguf", ExportOptions(), lossy=False)
    assert any(
        "<|endoftext|>" in note for note in planned.notes
    )  # which transformers has added, beyond the model's rows
    planned.write(tmp_path / "y.gguf", overwrite=False, progress=silent)
    convert(tmp_path / "y.gguf", tmp_path / "second")
    found = [stored(tmp_path / name) for name in ("first", "second")]
    for name, tensor in found[0].items():
        expected = tensor.half().float() if name.endswith("_scale") else tensor
        assert torch.equal(found[1][name], expected), name


def test_rows_with_a_scale_for_each_block_are_rounded_once_more(tmp_path):
    made = Source(float_config(torch_dtype="bfloat16"), kind=Q8_0)
    said = convert(made.write(tmp_path / "x.gguf"), tmp_path / "out")
    kept = f"{rows_of_one_scale(made)} of 1152 rows keep their integers"
    assert f"{kept}, the others had a scale for each block and were rounded anew, " in said
    checkpoint, tensors, seen = Checkpoint.open(tmp_path / "out"), stored(tmp_path / "out"), 0
    for name, expected in made.expected.items():
        if f"{name}_scale" not in tensors:
            assert tensors[name].dtype == torch.bfloat16
            continue
        seen += 1
        scale = expected.abs().amax(1, keepdim=True) / 127
        assert torch.allclose(tensors[f"{name}_scale"], scale, rtol=2**-10)
        assert ((tensors[name] * tensors[f"{name}_scale"] - expected).abs() <= 0.501 * scale).all(), name
        assert checkpoint.quant_type(name.removesuffix(".weight")) is QuantType.W8A16
    assert seen == 14
    assert Decoder(checkpoint).logits([1, 2, 3]).isfinite().all()


def test_what_a_block_of_zeros_is_multiplied_by_does_not_matter(tmp_path):
    made = Source(float_config(torch_dtype="bfloat16"), kind=Q8_0)
    raw, kind = made.tensors["blk.1.ffn_up.weight"]
    blocks = raw.reshape(96, 2, 34).copy()
    blocks[0, 1] = 0  # a block of zeros, with the scale 0 that llama.cpp gives it
    blocks[1] = 0  # a row of them
    made.tensors["blk.1.ffn_up.weight"] = blocks.reshape(raw.shape), kind
    kept = rows_of_one_scale(made) + 1  # the row of zeros is one of them already
    assert f"{kept} of 1152 rows keep their integers" in convert(made.write(tmp_path / "x.gguf"), tmp_path / "out")
    tensors = stored(tmp_path / "out")
    scale = np.ascontiguousarray(blocks[0, 0, :2]).view(np.float16)
    weight = "model.layers.1.mlp.up_proj.weight"
    assert tensors[f"{weight}_scale"][:2, 0].tolist() == [float(scale[0]), float(np.finfo(np.float32).eps)]
    assert tensors[weight][0, 32:].tolist() + tensors[weight][1].tolist() == [0] * 96


def test_a_scale_that_is_no_number_is_refused(cli, tmp_path):
    made = Source(float_config(), kind=Q8_0)
    raw, _ = made.tensors["blk.1.ffn_up.weight"]
    raw[3, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    path = made.write(tmp_path / "x.gguf")
    message = refused(cli, "import", path, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith("scales of blk.1.ffn_up.weight in ")


def test_what_is_not_in_q8_0_is_refused_or_stays_float(cli, tmp_path):
    path = Source(float_config()).write(tmp_path / "x.gguf")
    message = refused(cli, "import", path, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith("Q8_0 to import in ")
    made, mixed = Source(float_config(), kind=Q8_0), Source(float_config())
    down = "blk.0.ffn_down.weight"
    made.tensors[down] = mixed.tensors[down]
    path = made.write(tmp_path / "mixed.gguf")
    assert cli("import", path, tmp_path / "mixed", "--scheme", "w8a16").code == 0
    found = load_file(next((tmp_path / "mixed").glob("*.safetensors")))
    assert found["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    kind = gguf.GGMLQuantizationType.Q4_0
    made.tensors[down] = np.zeros((64, 96 // 32 * 18), np.uint8), kind
    path = made.write(tmp_path / "q4.gguf")
    message = refused(cli, "import", path, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith(f"type of {down} in ")
    assert "got Q4_0, expected Q8_0, or float. Leave out --scheme to import" in message


def test_a_scheme_is_for_gguf_files_alone(cli, tmp_path, float_model):
    message = refused(cli, "import", float_model, tmp_path / "out", "--scheme", "w8a16", within=tmp_path)
    assert message.startswith(("model to import in ", "--scheme: got w8a16, expected a GGUF file to import"))
