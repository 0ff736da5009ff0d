"""What `inspect` and `env` say is what is there."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eightfold import __version__, machine
from eightfold.format.checkpoint import Checkpoint
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.report.contents import Contents, Part, describe, describe_native, ranges
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, SPARSE, random_tensors, tiny_config, token_samples, write_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stored(directory: Path) -> dict[str, Any]:
    """Return every tensor of a directory's weight files, read by another library."""
    found: dict[str, Any] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    return found


def nbytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def quantize(source: Path, target: Path, scheme: QuantType = QuantType.W8A8, **options: Any) -> Contents:
    recipe = Recipe(scheme, keep_float=options.pop("keep_float", ()))
    quantize_checkpoint(source, target, recipe, token_samples(), **options)
    return describe(Checkpoint.open(target))


def part(contents: Contents, name: str, layers: str | None = None) -> Part:
    (found,) = [p for p in contents.parts if p.name == name and layers in (None, p.layers)]
    return found


def assert_sizes_add_up(contents: Contents, directory: Path) -> None:
    tensors = stored(directory)
    if contents.tied:
        tensors.pop("lm_head.weight", None)
    assert contents.nbytes == nbytes(tensors)
    assert contents.nbytes == sum(p.nbytes for p in contents.parts)
    assert contents.disk_bytes == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert contents.files == len(list(directory.glob("*.safetensors")))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_float_model(tmp_path, architecture, tied):
    config = tiny_config(architecture, tie_word_embeddings=tied)
    directory = write_model(tmp_path / "m", config, tokenizer=False)
    contents = describe(Checkpoint.open(directory))
    assert contents.directory == str(directory)
    assert (contents.architecture, contents.num_layers, contents.tied) == (architecture, 2, tied)
    assert (contents.scheme, contents.dtype, contents.notes) == ("FLOAT", "BF16", ())
    assert contents.parameters == sum(tensor.numel() for tensor in random_tensors(config).values())
    assert contents.float_bytes == contents.nbytes == 2 * contents.parameters
    assert_sizes_add_up(contents, directory)
    expected = ["embed_tokens", *LINEARS, "norms", *(() if tied else ("lm_head",))]
    assert [p.name.rpartition(".")[2] for p in contents.parts] == expected
    assert {(p.layers, p.count) for p in contents.parts if p.name.endswith("_proj")} == {("0-1", 2)}


@pytest.mark.parametrize("architecture", SPARSE)
def test_experts_are_counted_and_those_that_a_token_meets(cli, tmp_path, architecture):
    config = tiny_config(architecture, num_hidden_layers=3)
    source, out = write_model(tmp_path / "m", config, tokenizer=False), tmp_path / "out"
    contents = describe(Checkpoint.open(source))
    sizes = {name: tensor.numel() for name, tensor in random_tensors(config).items()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert contents.parameters == sum(sizes.values())
    assert contents.active_parameters == contents.parameters - of_experts * 3 // 5  # 2 of 5 for each token
    shared = " and one for all tokens" if architecture == "Qwen2MoeForCausalLM" else ""
    assert contents.notes == (f"experts: 5{shared} in layers 0-2; a token passes through 2 of them",)
    assert_sizes_add_up(contents, source)
    names = ("w1", "w3", "w2") if architecture == "MixtralForCausalLM" else ("gate_proj", "up_proj", "down_proj")
    for name in names:
        (found,) = [p for p in contents.parts if p.name.endswith(f".experts.#.{name}")]
        assert (found.layers, found.count, found.scheme) == ("0-2", 15, "FLOAT")
    made = cli("quantize", source, out, "--scheme", "w8a8-dynamic", "--keep-float", "*.1.*.experts.*")
    assert made.code == 0, made.err
    quantized = describe(Checkpoint.open(out))
    assert_sizes_add_up(quantized, out)
    assert quantized.active_parameters == contents.active_parameters
    experts = [(p.layers, p.scheme, p.count) for p in quantized.parts if p.name.endswith(f".experts.#.{names[0]}")]
    assert experts == [("0,2", "W8A8_DYNAMIC", 10), ("1", "FLOAT", 5)]
    assert {p.scheme for p in quantized.parts if p.name.endswith(("mlp.gate", "moe.gate", "expert_gate"))} == {"FLOAT"}
    lines = cli("inspect", out).out.splitlines()
    active = f"{contents.active_parameters / 1e6:,.1f} M active"
    assert lines[1].endswith(f"{contents.parameters / 1e6:,.1f} M parameters ({active}), BF16")


def test_all_parameters_of_a_dense_model_are_active(float_model):
    contents = describe(Checkpoint.open(float_model))
    assert contents.active_parameters == contents.parameters


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(QuantType.W8A8, "float32"), (QuantType.W8A8_DYNAMIC, "bfloat16"), (QuantType.W8A16, "float16")],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_quantized_model(tmp_path, scheme, dtype, tied):
    config = tiny_config("Qwen2ForCausalLM", torch_dtype=dtype, tie_word_embeddings=tied)
    source = write_model(tmp_path / "float", config, tokenizer=False)
    contents = quantize(source, tmp_path / "out", scheme)
    assert_sizes_add_up(contents, tmp_path / "out")
    assert contents.scheme == scheme.value
    # Of the float model: neither scales nor the copy of a tied head are parameters.
    assert contents.parameters == sum(tensor.numel() for tensor in random_tensors(config).values())
    assert contents.float_bytes == contents.parameters * {"float32": 4}.get(dtype, 2)
    down = part(contents, "mlp.down_proj")
    assert (down.layers, down.scheme, down.dtype, down.shape, down.count) == ("0-1", scheme.value, "I8", (48, 80), 2)
    tensors = stored(tmp_path / "out")
    for p in contents.parts:
        if p.name.endswith("_proj"):
            assert p.nbytes == nbytes({name: t for name, t in tensors.items() if f".{p.name}." in name})
    embedding = part(contents, "embed_tokens")
    assert (embedding.layers, embedding.scheme, embedding.count) == ("", "FLOAT", 1)
    assert embedding.shape == (320, 48)


def test_a_tied_head_is_counted_once_and_its_copy_is_explained(tmp_path):
    source = write_model(tmp_path / "float", tiny_config(tie_word_embeddings=True), tokenizer=False)
    contents = quantize(source, tmp_path / "out", QuantType.W8A16)
    assert "lm_head.weight" in stored(tmp_path / "out")
    assert contents.tied
    assert contents.disk_bytes - contents.nbytes > 320 * 48 * 2  # the copy, and the header
    assert any(note.startswith("lm_head is tied to the embedding") for note in contents.notes)
    assert "lm_head" not in [p.name for p in contents.parts]
    untied = write_model(tmp_path / "untied", tokenizer=False)
    notes = quantize(untied, tmp_path / "untied8", QuantType.W8A16).notes
    assert not any("tied" in note for note in notes)


def test_a_mixed_model_has_its_parts_by_layers(tmp_path):
    config = tiny_config(num_hidden_layers=5)
    source = write_model(tmp_path / "float", config, tokenizer=False)
    keep = ("model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj", "*.4.*", "*.v_proj")
    contents = quantize(source, tmp_path / "out", QuantType.W8A8_DYNAMIC, keep_float=keep)
    assert_sizes_add_up(contents, tmp_path / "out")
    parts = [(p.layers, p.scheme, p.dtype, p.count) for p in contents.parts if p.name == "mlp.down_proj"]
    assert parts == [("0,3-4", "FLOAT", "BF16", 3), ("1-2", "W8A8_DYNAMIC", "I8", 2)]
    assert part(contents, "self_attn.v_proj").layers == "0-4"
    assert part(contents, "self_attn.v_proj").scheme == "FLOAT"
    assert part(contents, "mlp.up_proj", "0-3").scheme == "W8A8_DYNAMIC"
    # 5 layers of 7 linears; kept are 2 of down_proj, the 7 of layer 4, and v_proj of the other four.
    (note,) = contents.notes
    assert note == "int8: 22 of 35 linears in the layers; float: 13 of them, embedding, norms, lm_head"


def test_a_wholly_quantized_model_says_so(tmp_path):
    contents = quantize(write_model(tmp_path / "float", tokenizer=False), tmp_path / "out")
    assert contents.notes == ("int8: 14 of 14 linears in the layers; float: embedding, norms, lm_head",)


def test_a_sharded_model_is_its_shards_together(tmp_path):
    source = write_model(tmp_path / "float", tokenizer=False)
    whole = quantize(source, tmp_path / "whole")
    sharded = quantize(source, tmp_path / "sharded", part_bytes=20_000)
    assert sharded.files > 3
    assert whole.files == 1
    assert_sizes_add_up(sharded, tmp_path / "sharded")
    assert sharded.parts == whole.parts
    assert (sharded.nbytes, sharded.parameters) == (whole.nbytes, whole.parameters)


def test_a_sharded_float_model_is_its_shards_together(tmp_path):
    directory = write_model(tmp_path / "m", tokenizer=False)
    single = describe(Checkpoint.open(directory))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, directory / file)
        weight_map.update(dict.fromkeys(chosen, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    contents = describe(Checkpoint.open(directory))
    assert_sizes_add_up(contents, directory)
    assert (contents.files, contents.parts, contents.nbytes) == (2, single.parts, single.nbytes)


def test_weights_without_an_offset_are_counted(tmp_path):
    quantize(write_model(tmp_path / "float", tokenizer=False), tmp_path / "out", QuantType.W8A8_DYNAMIC)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_offset"
    tensors = load_file(weights)
    del tensors[name]
    weights.unlink()
    save_file(tensors, weights)
    path = tmp_path / "out" / "quant_model_description.json"
    description = json.loads(path.read_text())
    del description[name]
    path.write_text(json.dumps(description))
    contents = describe(Checkpoint.open(tmp_path / "out"))
    assert "1 quantized linears come without weight_offset: symmetric" in contents.notes
    assert_sizes_add_up(contents, tmp_path / "out")


def test_no_weight_is_read(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_model(tmp_path / "m", tokenizer=False))
    monkeypatch.setattr(Checkpoint, "array", lambda self, name: pytest.fail(f"{name} was read"))
    describe(checkpoint)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 2], "0,2"),
        (list(range(30)), "0-29"),
        ([0, 1, 2, 3, 4, 7, 9, 10, 11], "0-4,7,9-11"),
        ([5, 6, 8, 9, 12], "5-6,8-9,12"),
    ],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text


# --- the commands


def test_inspect_prints_what_describe_says(cli, tmp_path):
    source = write_model(tmp_path / "float")
    contents = quantize(source, tmp_path / "out", keep_float=("*.0.mlp.down_proj",))
    shown = cli("inspect", tmp_path / "out")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0] == str(tmp_path / "out")
    assert lines[1] == "  model   LlamaForCausalLM, 2 layers, 0.1 M parameters, BF16"
    assert lines[2] == "  scheme  W8A8"
    share = f"{contents.nbytes / contents.float_bytes:.0%}"
    assert lines[3].startswith(f"  size    {contents.nbytes / 1000:.1f} kB of tensors, {share} of the BF16 model; ")
    assert lines[3].endswith("kB in 1 file")
    assert lines[4] == "  note    int8: 13 of 14 linears in the layers; float: 1 of them, embedding, norms, lm_head"
    rows = [line.split() for line in lines[7 : lines.index("", 7)]]
    assert lines[6].split() == ["module", "layers", "scheme", "weight", "shape", "count", "size"]
    assert len(rows) == len(contents.parts) == 11
    assert ["mlp.down_proj", "0", "FLOAT", "BF16", "48x80", "1", "7.7", "kB"] in rows
    assert ["mlp.up_proj", "0-1", "W8A8", "I8", "80x48", "2"] in [row[:6] for row in rows]
    assert ["norms", "FLOAT", "BF16", "48", "5", "480", "B"] in rows


def test_inspect_as_json_is_describe_and_the_native_core(cli, tmp_path):
    directory = write_model(tmp_path / "float")
    shown = cli("inspect", directory, "--json")
    assert shown.code == 0, shown.err
    expected = json.loads(json.dumps(asdict(describe(Checkpoint.open(directory)))))
    native = json.loads(json.dumps(asdict(describe_native(Checkpoint.open(directory)))))
    assert shown.json() == {**expected, "native": native}
    assert shown.json()["parts"][0] == {
        "name": "embed_tokens",
        "layers": "",
        "scheme": "FLOAT",
        "dtype": "BF16",
        "shape": [320, 48],
        "count": 1,
        "nbytes": 320 * 48 * 2,
    }


def test_inspect_of_no_model_is_one_line(cli, tmp_path):
    shown = cli("inspect", tmp_path / "absent")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("eightfold: no directory ")
    assert shown.err.count("\n") == 1


# --- environment


def test_environment_names_versions_and_machine():
    import numpy

    found = machine.environment()
    assert found["eightfold"] == __version__
    assert found["packages"]["numpy"] == numpy.__version__
    assert set(found["packages"]) >= {"numpy", "tokenizers", "jinja2", "torch", "transformers", "gguf"}
    assert found["threads"] >= 1
    assert found["memory_bytes"] is None or found["memory_bytes"] > 1 << 20
    assert found["cpu"]
    json.dumps(found)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("numpy", "no-such-package-anywhere"))
    assert machine.environment()["packages"]["no-such-package-anywhere"] is None


def replace_proc(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Let files below /proc hold a text, or not be there."""
    original = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if not self.is_relative_to("/proc"):
            return original(self, *args, **kwargs)
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


CPUINFO = {
    "x86": (
        "processor\t: 0\nmodel name\t: A Big CPU @ 2: fast\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n",
        "A Big CPU @ 2: fast",
        ["avx2", "avx512f", "avx512_vnni", "amx_int8"],
    ),
    "arm": ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve\n", None, ["asimddp", "i8mm", "sve"]),
    "empty": ("", None, []),
}


@pytest.mark.parametrize(("text", "model", "isa"), CPUINFO.values(), ids=CPUINFO)
def test_the_processor_is_read_as_linux_describes_it(monkeypatch, text, model, isa):
    replace_proc(monkeypatch, text)
    monkeypatch.setattr(platform, "processor", lambda: "fallback")  # type: ignore[attr-defined]
    found = machine.environment()
    assert (found["cpu"], found["isa"]) == (model or "fallback", isa)


def test_a_system_that_says_nothing_is_no_failure(monkeypatch):
    replace_proc(monkeypatch, None)
    monkeypatch.setattr(machine, "total_bytes", lambda: None)  # type: ignore[attr-defined]
    found = machine.environment()
    assert found["isa"] == []
    assert found["cpu"]
    assert found["memory_bytes"] is found["memory_available_bytes"] is None


def test_env_prints_and_gives_json(cli):
    shown = cli("env")
    assert shown.code == 0, shown.err
    lines = dict(line.split(":", 1) for line in shown.out.splitlines())
    assert lines["eightfold"].strip() == __version__
    assert "numpy" in lines["packages"]
    document = cli("env", "--json").json()
    assert document.keys() == machine.environment().keys()
    assert document["eightfold"] == __version__


@pytest.mark.parametrize(
    ("rope", "note"),
    [
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
            "positions: 400, which yarn makes of 100",
        ),
        (
            {"type": "dynamic", "factor": 4.0},
            "positions: 128, and by dynamic scaling up to 512 with --max-model-len",
        ),
        (
            {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 100,
            },
            "positions: 128 by longrope, with other factors where --max-model-len is at most 100",
        ),
    ],
)
def test_how_far_a_model_looks_back_by_its_rope_type(tmp_path, rope, note):
    model = write_model(tmp_path / "m", tiny_config(rope_scaling=rope), tokenizer=False)
    assert note in describe(Checkpoint.open(model)).notes
