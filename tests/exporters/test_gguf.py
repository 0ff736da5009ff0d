"""An 8-bit directory becomes a GGUF file: its integers, its settings and its tokenizer, and what is lost is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.exporters import ExportOptions, plan_export
from eightfold.exporters.gguf import GgufExport
from eightfold.exporters.gguf_tensors import Tensor
from eightfold.exporters.one_file import GrowingFile
from eightfold.format.gguf_pretokenizers import CUTS, cut_named, write_cut
from eightfold.format.output import DIRECTORY_MODE
from eightfold.progress import silent
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import SCHEMES
from eightfold.tokenizer import Tokenizer
from tests.conftest import CHAT_TEMPLATE, Result, token_samples, write_model
from tests.quant.killing import killed_after
from tests.refusal import refused

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from eightfold.config import DType  # noqa: E402
from eightfold.importers.gguf import import_gguf  # noqa: E402
from tests.importers.gguf_source import float_config, gguf_name, paired_rows  # noqa: E402

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "", "qwen3": ""}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    if family == "mistral":
        changes = {"architectures": [FAMILIES[family]], "model_type": family, "sliding_window": None, **changes}
    base = float_config("llama" if family == "mistral" else family, torch_dtype="bfloat16")
    return {**base, **changes}


def model_of(folder: Path, config: dict[str, Any]) -> Path:
    """Write a float model whose tokenizer has merges, without which no reader takes one."""

    def add_merges(content: dict[str, Any]) -> None:
        content["model"]["vocab"].update({added["content"]: added["id"] for added in content["added_tokens"]})
        for token, pair in ((261, "t h"), (262, "th e")):
            content["model"]["vocab"][pair.replace(" ", "")] = token
            content["model"]["merges"].append(pair.split())

    write_model(folder, config)
    edit_tokenizer(folder, add_merges)
    return folder


def edit_tokenizer(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.chmod(0o600)
    path.write_text(json.dumps(content))


def quantized(folder: Path, family: str = "llama", scheme: str = "w8a16", changes: Any = None, **options: Any) -> Path:
    source = model_of(folder / "float", config_of(family, **(changes or {})))
    quantize_checkpoint(source, folder / "out", Recipe(SCHEMES[scheme], **options), token_samples())
    return folder / "out"


def export(source: Path, target: Path, *, lossy: bool = False, **options: Any) -> Any:
    planned = plan_export(source, "gguf", ExportOptions(**options), lossy=lossy)
    assert planned.write(target, overwrite=False, progress=silent) is False
    return planned


class Read:
    """What the gguf package's own reader finds."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
        self.data = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}

    def blocks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers of Q8_0, (N, K), and the scale of each block."""
        raw = self.data[name].reshape(self.shapes[name][0], -1, 34)
        values = np.ascontiguousarray(raw[..., 2:]).view(np.int8).reshape(self.shapes[name])
        return values, np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next(directory.glob("*.safetensors")))


def ordered(family: str, name: str, values: np.ndarray) -> np.ndarray:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return paired_rows(values, heads) if heads and family in ("llama", "mistral") else values


@pytest.mark.parametrize("family", FAMILIES)
def test_integers_stay_and_each_block_has_the_scale_of_its_row(tmp_path, family):
    out = quantized(tmp_path, family)
    planned = export(out, tmp_path / "x.gguf")
    assert planned.losses == []
    read, tensors = Read(tmp_path / "x.gguf"), stored(out)
    seen = set()
    for name, tensor in tensors.items():
        if not name.endswith((".weight", ".bias")):
            continue
        seen.add(there := gguf_name(name))
        assert read.shapes[there] == tuple(tensor.shape)
        if tensor.dtype == torch.int8:
            values, scales = read.blocks(there)
            assert np.array_equal(values, ordered(family, name, tensor.numpy())), name
            scale = ordered(family, name, tensors[f"{name}_scale"].numpy()).astype(np.float16)
            assert np.array_equal(scales, np.broadcast_to(scale, scales.shape)), name
        elif tensor.dim() == 2:
            assert read.kinds[there] == "BF16"
            bits = np.ascontiguousarray(read.data[there]).view(np.uint16).reshape(tensor.shape)
            assert np.array_equal(bits, tensor.view(torch.uint16).numpy())
        else:
            assert read.kinds[there] == "F32"
            assert np.array_equal(read.data[there], ordered(family, name, tensor.float().numpy()))
    assert seen == set(read.kinds)
    assert any(name.endswith("attn_q.bias") for name in seen) is (family == "qwen2")
    assert read.fields["general.architecture"] == ("llama" if family == "mistral" else family)


def test_the_file_is_the_model_that_it_was_made_of(tmp_path):
    # Scales that float16 holds: then the imported model is the dequantized one to the last bit.
    out = quantized(tmp_path)
    path, tensors = next(out.glob("*.safetensors")), stored(out)
    for name in tensors:
        if name.endswith("_scale"):
            tensors[name] = tensors[name].half().float()
    path.chmod(0o600)
    save_file(tensors, str(path))
    export(out, tmp_path / "x.gguf")
    import_gguf(tmp_path / "x.gguf", tmp_path / "float-again", DType.BF16)
    found = load_file(tmp_path / "float-again" / "model.safetensors")
    for name, tensor in found.items():
        expected = tensors[name].float()
        if f"{name}_scale" in tensors:
            expected = expected * tensors[f"{name}_scale"]
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "float-again"))
    same = ("hidden_size", "num_key_value_heads", "head_dim", "rope_theta", "max_position_embeddings", "bos_token_id")
    assert [ours[key] for key in same] == [theirs[key] for key in same]


def test_the_metadata_is_complete(tmp_path):
    export(quantized(tmp_path), tmp_path / "x.gguf")
    fields = Read(tmp_path / "x.gguf").fields
    expected = {
        "general.type": "model",
        "general.name": "out",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: fields.get(key) for key in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[256:264] == ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "th", "the", "[PAD263]"]
    kinds = gguf.TokenType
    assert types[255:264] == [kinds.NORMAL, *[kinds.CONTROL] * 5, kinds.NORMAL, kinds.NORMAL, kinds.UNUSED]
    assert len(tokens) == len(set(tokens)) == len(types) == 320


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_stretched_positions_come_back_as_they_were(tmp_path, kind):
    out = quantized(tmp_path, changes={"rope_scaling": SCALINGS[kind]})
    export(out, tmp_path / "x.gguf")
    rope = import_gguf(tmp_path / "x.gguf", tmp_path / "again", DType.BF16).rope
    assert {key: getattr(rope, key) for key in SCALINGS[kind]} == SCALINGS[kind]
    assert ("rope_freqs.weight" in Read(tmp_path / "x.gguf").kinds) is (kind == "llama3")


def test_a_static_model_loses_its_input_scales_and_keeps_its_biases(tmp_path):
    out = quantized(tmp_path, "qwen2", "w8a8")
    path, tensors = next(out.glob("*.safetensors")), stored(out)
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.bias")}
    assert len(biases) == 6
    path.chmod(0o600)
    description = out / "quant_model_description.json"
    entries = json.loads(description.read_text())
    save_file({name: tensor for name, tensor in tensors.items() if name not in biases}, str(path))
    description.write_text(json.dumps({name: kind for name, kind in entries.items() if name not in biases}))
    planned = export(out, tmp_path / "x.gguf", lossy=True)
    assert planned.losses == ["the input scales of 14 linears: llama.cpp rounds inputs by itself, in blocks of 32"]
    read = Read(tmp_path / "x.gguf")
    for name, bias in biases.items():
        found, step = read.data[gguf_name(name)], tensors[name.replace("bias", "deq_scale")].numpy()
        assert np.all(np.abs(found - bias.float().numpy()) <= 0.51 * step + 2**-8 * np.abs(found)), name
        values, scales = read.blocks(gguf_name(name.replace("bias", "weight")))
        assert np.array_equal(values, tensors[name.replace("bias", "weight")].numpy())
        assert scales[:, 0] == pytest.approx(tensors[name.replace("bias", "weight_scale")][:, 0].numpy(), rel=1e-3)


def test_offsets_and_floats_become_new_integers_where_that_is_asked_for(tmp_path):
    out = quantized(tmp_path, weight_symmetric=False, keep_float=("*.mlp.down_proj",))
    planned = export(out, tmp_path / "x.gguf", lossy=True, floats="q8_0")
    assert planned.losses == [
        "the integers of 12 weights with offsets, which are rounded anew",
        "the exact values of 4 float matrices, rounded to Q8_0",
    ]
    read, tensors = Read(tmp_path / "x.gguf"), stored(out)
    for name in ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        weight = tensors[f"{name}.weight"].float()
        if f"{name}.weight_offset" in tensors:
            weight = (weight - tensors[f"{name}.weight_offset"]) * tensors[f"{name}.weight_scale"]
        values, scales = read.blocks(gguf_name(f"{name}.weight"))
        real = values.reshape(len(values), -1, 32) * scales[..., None].astype(np.float32)
        assert np.abs(real.reshape(weight.shape) - weight.numpy()).max() <= weight.abs().max() / 127 * 0.51


def test_scales_below_float16_are_a_loss(tmp_path):
    out = quantized(tmp_path)
    path, tensors = next(out.glob("*.safetensors")), stored(out)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = 3.1e-7
    path.chmod(0o600)
    save_file(tensors, str(path))
    (loss,) = plan_export(out, "gguf", ExportOptions(), lossy=True).losses
    assert loss.startswith("scales of 1 weights that are too small for float16 (off by up to ")
    assert "model.layers.1.mlp.up_proj.weight" in loss


def test_attention_a_window_and_what_is_dynamic_are_losses(tmp_path):
    changes = {"sliding_window": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    out = quantized(tmp_path, "mistral", changes=changes, kv_int8=True)
    assert plan_export(out, "gguf", ExportOptions(), lossy=True).losses == [
        "C8 in 2 layers: int8 keys and values become float",
        "the sliding window of 64 positions: longer texts see all of them",
        "dynamic rotary scaling: texts of more than 128 tokens",
    ]


# --- refusals, on the command line


def line(cli: Callable[..., Result], source: Path, *options: object, target: str = "x.gguf") -> str:
    return refused(cli, "export", source, source.parent / target, "--to", "gguf", *options, within=source.parent)


def test_what_is_lost_has_to_be_agreed_to(cli, tmp_path):
    out = quantized(tmp_path, scheme="w8a8")
    assert line(cli, out) == (
        f"export to gguf in {out}: got what it cannot hold: the input scales of 14 linears: llama.cpp rounds inputs by "
        "itself, in blocks of 32, expected a model that it can hold. Give --lossy to write the model without."
    )
    done = cli("export", out, tmp_path / "x.gguf", "--to", "gguf", "--lossy", "--json")
    assert (done.code, done.json()["losses"]) == (0, [done.err.splitlines()[0].removeprefix("note: lost: ")])


def test_rows_that_are_no_whole_blocks_are_named(cli, tmp_path):
    out = quantized(tmp_path, changes={"intermediate_size": 80})
    message = line(cli, out)
    assert message.startswith("shape of model.layers.0.mlp.down_proj.weight in ")
    assert ": got [64, 80], expected rows of whole blocks of 32, for Q8_0. " in message


def test_families_and_settings_that_the_readers_lack_are_named(cli, tmp_path):
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
    model_of(tmp_path / "g", config_of("llama", **gemma))
    expected = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or MistralForCausalLM"
    assert f"got Gemma2ForCausalLM, expected {expected}. " in line(cli, tmp_path / "g")
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 64,
    }
    model_of(tmp_path / "r", config_of("llama", rope_scaling=longrope))
    assert line(cli, tmp_path / "r").startswith("rope type to export to gguf in ")
    model_of(tmp_path / "a", config_of("qwen3", attention_bias=True))
    assert line(cli, tmp_path / "a").startswith("attention_bias to export to gguf in ")


def test_a_tokenizer_that_the_readers_lack_is_named(cli, tmp_path):
    model = model_of(tmp_path / "m", config_of("llama"))
    edit_tokenizer(model, lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}))  # fmt: skip
    message = line(cli, model)
    assert message.startswith("pre-tokenizer in ")
    assert "got \\p{L}+ then bytes, expected that of gpt-2, smollm, qwen2, llama-bpe, smaug-bpe or tekken" in message
    model = model_of(tmp_path / "few", config_of("llama", vocab_size=260))
    assert ": got 'the', expected ids below 260, as the model has" in line(cli, model)
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert line(cli, tmp_path / "m").startswith("tokenizer.json in ")


def set_ignoring(ignores: bool, content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = ignores


def fields_of(model: Path) -> dict[str, Any]:
    planned: Any = plan_export(model, "gguf", ExportOptions(), lossy=False)
    return planned.fields


def test_the_pre_tokenizer_is_known_by_what_it_does(tmp_path):
    model = model_of(tmp_path / "m", config_of("llama"))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    split = {"type": "Split", "pattern": {"Regex": words + r"\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    for steps, ignores, name in (
        ([digits, {**letters, "use_regex": True}], False, "smollm"),
        ([split, {**letters, "use_regex": False}], True, "llama-bpe"),
    ):
        sequence = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        edit_tokenizer(model, partial(dict.update, **sequence))
        edit_tokenizer(model, partial(set_ignoring, ignores))
        assert fields_of(model)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", CUTS)
def test_a_tokenizer_cuts_texts_after_its_way_there_and_back(tmp_path, name):
    def cut(content: dict[str, Any]) -> None:
        write_cut(content, CUTS[name])
        for token, pair in ((263, "1 2"), (264, "12 3"), (265, "123 4"), (266, "' S")):
            content["model"]["vocab"][pair.replace(" ", "")] = token
            content["model"]["merges"].append(pair.split())

    model = model_of(tmp_path / "m", config_of("llama"))
    edit_tokenizer(model, cut)
    assert fields_of(model)["tokenizer.ggml.pre"] == name
    export(model, tmp_path / "x.gguf")
    import_gguf(tmp_path / "x.gguf", tmp_path / "again", DType.BF16)
    before, after = Tokenizer(model), Tokenizer(tmp_path / "again")
    texts = ["the 1234 12341234", "in 2023, 12\n\n3", "IT'S 1/2 theThe\tthe", "a12 ١٢٣ ¼ 你好 🙂", "<s>12</s>"]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    expected = {"gpt-2": 1, "llama-bpe": 2, "smaug-bpe": 2}.get(name, 4)
    assert len(after.encode("1234")) == expected


def test_names_that_mean_the_same_are_read(tmp_path):
    assert cut_named("refact") == cut_named("smollm") != cut_named("llama3") == cut_named("llama-bpe")
    assert cut_named("default") is None


def test_pieces_of_sentencepiece_get_scores_in_the_order_of_their_merges(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    model = model_of(tmp_path / "m", config_of("llama"))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "aab"]
    merges = [("a", "b"), ("▁", "ab"), ("a", "ab")]
    pieces = models.BPE({text: i for i, text in enumerate(texts)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<s>", "</s>")])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    fields = fields_of(model)
    known = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    assert (known["model"], known["add_space_prefix"], known["add_bos_token"]) == ("llama", True, True)
    score = dict(zip(known["tokens"], known["scores"], strict=True))
    assert score["ab"] > score["▁ab"] > score["aab"] > score["<s>"]
    kind = dict(zip(known["tokens"], known["token_type"], strict=True))
    kinds = gguf.TokenType
    assert [kind[text] for text in ("<unk>", "<s>", "<0x0A>", "ab")] == [
        kinds.UNKNOWN,
        kinds.CONTROL,
        kinds.BYTE,
        kinds.NORMAL,
    ]


def test_a_file_that_exists_is_replaced_only_if_export_has_written_it(cli, tmp_path):
    out = quantized(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF of somebody else")
    assert "got a file, expected nothing yet. Choose another, or replace it with --overwrite." in line(cli, out)
    assert "got a file that `eightfold export` did not write" in line(cli, out, "--overwrite")
    (tmp_path / "x.gguf").unlink()
    assert cli("export", out, tmp_path / "x.gguf", "--to", "gguf").code == 0
    first = (tmp_path / "x.gguf").read_bytes()
    assert "expected nothing yet" in line(cli, out)
    assert cli("export", out, tmp_path / "x.gguf", "--to", "gguf", "--overwrite").code == 0
    assert (tmp_path / "x.gguf").read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def again(source: Path, target: Path, **options: Any) -> None:
    plan_export(source, "gguf", ExportOptions(), lossy=False).write(
        target, overwrite=options.get("overwrite", False), progress=silent
    )


def test_an_export_that_is_killed_anywhere_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    out = quantized(tmp_path)
    with killed_after(10**9, monkeypatch) as watch:
        again(out, tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for left in range(watch.seen - 1, 0, -11):
        target = tmp_path / str(left) / "x.gguf"
        target.parent.mkdir()
        with killed_after(left, monkeypatch):
            again(out, target)
        is_in_place = target.exists()
        again(out, target, overwrite=is_in_place)
        assert target.read_bytes() == whole, left
        assert [path.name for path in target.parent.iterdir()] == ["x.gguf"], left


def stopped(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Export until an interrupt comes before a tensor; return the names of the tensors that were written."""
    written: list[str] = []

    def write(self: GgufExport, file: GrowingFile, tensor: Tensor, call: Any = GgufExport._write_tensor) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(tensor.name)
        call(self, file, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(GgufExport, "_write_tensor", write)
        with suppress(KeyboardInterrupt):
            again(source, target)
    return written


def test_a_stopped_export_writes_only_what_it_has_not_finished(tmp_path, monkeypatch):
    out, target = quantized(tmp_path), tmp_path / "x.gguf"
    first = stopped(out, target, monkeypatch, after=17)
    grown = tmp_path / ".x.gguf.partial" / "x.gguf"
    rest = stopped(out, target, monkeypatch, after=10**9)
    assert first[-1].startswith("blk.1.") and rest[0].startswith("blk.1.") and rest[-1] == "output.weight"
    assert set(first) & set(rest) == {name for name in first[6:] if name.startswith("blk.1.") and "norm" not in name}
    whole = target.read_bytes()

    target.unlink()
    stopped(out, target, monkeypatch, after=17)
    begun = bytearray(grown.read_bytes())
    begun[-len(begun) // 4] ^= 1  # in what the journal tells of
    grown.write_bytes(begun)
    assert stopped(out, target, monkeypatch, after=10**9)[0] == "token_embd.weight"
    assert target.read_bytes() == whole


def test_what_was_begun_of_another_source_is_not_gone_on_with(cli, tmp_path, monkeypatch):
    out = quantized(tmp_path)
    stopped(out, tmp_path / "x.gguf", monkeypatch, after=17)
    message = refused(cli, "export", out, tmp_path / "x.gguf", "--to", "gguf", "--floats", "q8_0", "--lossy",
                      within=tmp_path)  # fmt: skip
    assert message.startswith(f"output file {tmp_path / 'x.gguf'}: got one begun otherwise (--floats: keep -> q8_0), ")
    path, tensors = next(out.glob("*.safetensors")), stored(out)
    tensors["model.norm.weight"][0] += 1
    path.chmod(0o600)
    save_file(tensors, str(path))
    assert f"(source: {path.name} has changed)" in line(cli, out)
    assert cli("export", out, tmp_path / "x.gguf", "--to", "gguf", "--overwrite").code == 0
    again(out, tmp_path / "y.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_places_where_no_file_can_be_made_are_named(cli, tmp_path):
    out = quantized(tmp_path)
    assert line(cli, out, target="none/x.gguf").startswith(f"no folder {tmp_path / 'none'}: expected one to write x.gg")
    assert "got a place inside the source" in line(cli, out, target="out/x.gguf")
    (tmp_path / "folder").mkdir(mode=DIRECTORY_MODE)
    assert "got a directory, or no plain file, expected a file" in line(cli, out, target="folder")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "elsewhere")
    assert "got a symbolic link" in line(cli, out, "--overwrite", target="link.gguf")


def test_a_damaged_weight_leaves_nothing(cli, tmp_path):
    model = model_of(tmp_path / "m", config_of("llama"))
    tensors = stored(model)
    tensors["lm_head.weight"][7, 5] = float("nan")
    save_file(tensors, str(model / "model.safetensors"))
    assert line(cli, model).startswith("lm_head.weight[7, 5] in ")


def test_without_the_gguf_package_the_extra_is_named(cli, tmp_path, monkeypatch):
    out = quantized(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert line(cli, out) == (
        "eightfold export --to gguf needs gguf: got none installed. Install it: pip install 'eightfold[gguf]'"
    )
