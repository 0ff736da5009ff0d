"""GGUF files that cannot be imported, outputs that stay as they are, and the command line."""

from __future__ import annotations

import math
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from eightfold.config import DType
from eightfold.errors import CheckpointError, EightfoldError, OutputError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from eightfold.importers.gguf import import_gguf  # noqa: E402
from tests.importers.gguf_source import F32, Source, float_config  # noqa: E402

# --- what cannot be imported


def test_another_architecture_is_refused(tmp_path):
    path = Source(float_config(), "gemma").write(tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedError, match=r"got gemma, expected a dense model of llama, qwen2 or qwen3"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_file_that_names_no_architecture_is_refused(tmp_path):
    path = Source(float_config()).write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architextur_"))
    with pytest.raises(EightfoldError, match=r"architecture in .*tiny\.gguf"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_an_architecture_that_is_no_name_is_refused(tmp_path):
    kinds = gguf.GGUFValueType
    key = b"general.architecture"
    field = struct.pack("<Q20sIIQB", len(key), key, kinds.ARRAY, kinds.UINT8, 1, 7)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(UnsupportedError, match=r"architecture in .*got \[7\], expected a dense model"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_mixture_of_experts_is_refused(tmp_path):
    made = Source(float_config())
    made.metadata = [lambda writer: writer.add_expert_count(8)]
    with pytest.raises(UnsupportedError, match=r"expected a dense model"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    dense = Source(float_config())
    dense.metadata = [lambda writer: writer.add_expert_count(0)]
    import_gguf(dense.write(tmp_path / "dense.gguf"), tmp_path / "dense", DType.BF16)


def test_missing_tensors_are_named(tmp_path):
    made = Source(float_config())
    made.left_out = {"blk.1.attn_q.weight", "output_norm.weight"}
    with pytest.raises(CheckpointError) as failure:
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    message = str(failure.value)
    assert "no model.layers.1.self_attn.q_proj.weight, model.norm.weight" in message
    assert "expected 21 known ones" in message


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0.attn_rot_embd.weight", "blk.0.attn_rot_embd.weight"),
        ("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("blk.0.attn_v.scale", "blk.0.attn_v.scale"),
        ("v.patch.weight", "v.patch.weight"),
        ("output_norm.bias", "output_norm.bias"),
    ],
)
def test_unknown_tensors_are_named(tmp_path, name, shown):
    made = Source(float_config())
    made.extra[name] = (np.ones((64, 64), dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=rf"LlamaForCausalLM in .*got also {re.escape(shown)}, expected 21 known"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


def test_a_family_without_q_and_k_norms_does_not_lose_them_silently(tmp_path):
    made = Source(float_config())
    made.extra["blk.0.attn_q_norm.weight"] = (np.ones(32, dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=r"also model\.layers\.0\.self_attn\.q_norm\.weight"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", (96, 64)),
        ("blk.0.attn_k.weight", (64, 32)),
        ("blk.1.ffn_down.weight", (96, 64)),
        ("blk.1.attn_v.weight", (65, 64)),
        ("output_norm.weight", (65,)),
        ("output.weight", (300, 64)),
        ("token_embd.weight", (320, 65)),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape):
    made = Source(float_config())
    made.tensors[name] = (np.ones(shape, dtype=np.float32), F32)
    with pytest.raises(CheckpointError, match=r"shape of .* in .*tiny\.gguf: got \["):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


def test_a_tensor_type_without_a_rule_is_named(tmp_path):
    made = Source(float_config())
    kind = gguf.GGMLQuantizationType.I32
    made.tensors["blk.0.attn_v.weight"] = (np.ones((64, 64), dtype=np.int32), kind)
    with pytest.raises(UnsupportedError, match=r"tensor type of blk\.0\.attn_v\.weight in .*got I32"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "action"),
    [(1e5, DType.F16, "Import as bf16"), (math.inf, DType.BF16, "fetch"), (math.nan, DType.BF16, "fetch")],
)
def test_values_that_the_type_cannot_hold_are_refused(tmp_path, value, dtype, action):
    made = Source(float_config())
    made.tensors["blk.1.attn_k.weight"][0][3, 4] = value
    with pytest.raises(CheckpointError, match=rf"values of blk\.1\.attn_k\.weight in .*expected finite ones.*{action}"):
        import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_the_largest_float16_is_held(tmp_path):
    made = Source(float_config())
    made.tensors["blk.1.attn_v.weight"][0][3, 4] = -65504
    import_gguf(made.write(tmp_path / "tiny.gguf"), tmp_path / "out", DType.F16)
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    assert float(found[3, 4]) == -65504


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, source):
    content, path = source.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"container in .*cut\.gguf: .*expected a whole GGUF file"):
            import_gguf(path, tmp_path / "out", DType.BF16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"no gguf file at all", b"GGUF", b"GGUF\x63\0\0\0" + bytes(64), bytes(100)]
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"container in .*x\.gguf: .*expected a whole GGUF file"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_a_damaged_count_does_not_read_on_past_the_end(tmp_path):
    # One metadata field: an array that says it has 100,000 bytes, and has 3. Read on, each would be an empty value.
    field = struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 100_000) + bytes(3)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(
        CheckpointError,
        match=rf"container in .*: got a file that ends at byte {path.stat().st_size}, too early, expected",
    ):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_damaged_metadata_never_ends_in_a_traceback(tmp_path, source):
    # Bytes of the header in turn are changed; what can still be imported is, and the rest is refused in words.
    content, path = source.read_bytes(), tmp_path / "bad.gguf"
    refused = 0
    for at in range(4, 1200, 11):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            import_gguf(path, tmp_path / "out", DType.BF16, overwrite=True)
        except EightfoldError:
            refused += 1
    assert refused > 30


def test_a_split_file_is_read_from_any_of_its_parts(tmp_path):
    made = Source(float_config())
    made.write(tmp_path / "whole.gguf")
    made.write(tmp_path / "tiny.gguf", part_tensors=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    outputs = [tmp_path / f"out{i}" for i in range(3)]
    for path, target in zip((tmp_path / "whole.gguf", parts[0], parts[2]), outputs, strict=True):
        import_gguf(path, target, DType.BF16)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert len({(target / name).read_bytes() for target in outputs}) == 1
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"^parts of .*got no tiny-00002-of-00003\.gguf, .*all 3\."):
        import_gguf(parts[0], tmp_path / "x", DType.BF16)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"^split .*renamed\.gguf: got one of 3 parts, .*gguf-split --merge"):
        import_gguf(tmp_path / "renamed.gguf", tmp_path / "x", DType.BF16)


KINDS = gguf.GGUFValueType


def head(tensors: int, fields: int, *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(rest)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (head(2**63, 0), f"{2**63} tensors, and not at most 100000"),
        (head(0, 2**63), f"{2**63} fields, and not at most 10000"),
        (head(0, 1, struct.pack("<Q", 2**63)), f"{2**63} bytes of a text, and not at most 16777216"),
        (head(0, 1, field(b"a", 9, struct.pack("<IQ", 0, 2**63))), f"{2**63} items of a list, and not at most 2000000"),
        (head(0, 1, field(b"a", 9, struct.pack("<IQ", 9, 1)) * 9), "lists of lists"),
        (head(0, 1, field(b"a", 13, b"")), "a field of type 13"),
        (head(0, 2, field(b"a", 0, b"\1"), field(b"a", 0, b"\1")), "two fields 'a'"),
        (head(0, 1, text(b"\xff"), bytes(9)), "text that is not UTF-8 before byte 33"),
        (head(1, 0, tensor(b"a", [])), "a tensor of 0 dimensions"),
        (head(1, 0, tensor(b"a", [1] * 5)), "a tensor of 5 dimensions"),
        (head(1, 0, tensor(b"a", [2**62] * 4)), "a file that ends before tensor 'a' does"),
        (head(1, 0, tensor(b"a", [0])), "tensor 'a' of shape [0] at 0"),
        (head(1, 0, tensor(b"a", [4], offset=1), bytes(99)), "tensor 'a' of shape [4] at 1"),
        (head(1, 0, tensor(b"a", [33], kind=8), bytes(99)), "tensor 'a' of shape [33] at 0"),
        (head(1, 0, tensor(b"a", [4], kind=999), bytes(99)), "tensor 'a' of type 999"),
        (head(2, 0, tensor(b"a", [4]), tensor(b"a", [4]), bytes(99)), "tensor 'a' twice"),
        (
            head(2, 0, tensor(b"a", [16]), tensor(b"b", [4], offset=32), bytes(199)),
            "tensor 'b' in the place of another",
        ),
        (head(0, 1, field(b"general.alignment", 4, struct.pack("<I", 0))), "alignment 0"),
        (head(0, 1, field(b"general.alignment", 8, text(b"x" * 400))), f"alignment '{'x' * 56}..."),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648, and not 2 or 3, little-endian"),
    ],
)
def test_counts_places_and_sizes_that_lie_are_refused_at_once(tmp_path, content, got):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as failure:
        import_gguf(path, tmp_path / "out", DType.BF16)
    assert str(failure.value) == f"container in {path}: got {got}, expected a whole GGUF file. Fetch it again."


def test_a_list_of_millions_of_values_is_not_kept(tmp_path):
    path = tmp_path / "x.gguf"
    many = field(b"b", 9, struct.pack("<IQ", 8, 1_000_000) + bytes(8) * 1_000_000)
    path.write_bytes(head(0, 2, many, many.replace(b"b", b"c", 1)))
    with pytest.raises(UnsupportedError, match="architecture"):
        import_gguf(path, tmp_path / "out", DType.BF16)
    path.write_bytes(head(0, 3, many, many.replace(b"b", b"c", 1), many.replace(b"b", b"d", 1)))
    with pytest.raises(CheckpointError, match="lists of more than 2000000 items in all"):
        import_gguf(path, tmp_path / "out", DType.BF16)


def test_what_would_be_waited_for_and_what_points_elsewhere_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, got in (("pipe", "a FIFO"), ("lfs", "a Git LFS pointer")):
        with pytest.raises(CheckpointError, match=rf"^{name}\.gguf in .*: got {got}, expected "):
            import_gguf(tmp_path / f"{name}.gguf", tmp_path / "out", DType.BF16)


@pytest.mark.parametrize("most", [1000, 3000])
def test_a_disk_that_is_full_while_the_tokenizer_is_written_is_one_line(tmp_path, source, most):
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        "from eightfold.cli.main import main\n"
        "sys.argv[0] = 'eightfold'\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", code, "import-gguf", source, tmp_path / "out"]
    no_bytecode = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # or modules of ours would be cut short there
    done = subprocess.run(command, capture_output=True, text=True, env=no_bytecode)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.match(r"eightfold: .*[Ff]ile too large", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_lies_beside_the_file_does_not_enter_the_output(tmp_path, source):
    import_gguf(source, tmp_path / "alone", DType.BF16)
    (tmp_path / "secret").write_text("of the user")
    for name in ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "additional.jinja"):
        (tmp_path / name).symlink_to(tmp_path / "secret")
    import_gguf(source, tmp_path / "beside", DType.BF16)
    names = {path.name for path in (tmp_path / "alone").iterdir()} - {"eightfold_journal.jsonl"}
    assert names == {path.name for path in (tmp_path / "beside").iterdir()} - {"eightfold_journal.jsonl"}
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_a_missing_file_and_a_directory_are_no_files(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"^no file .*expected a \.gguf file\. Check the path\.$"):
            import_gguf(path, tmp_path / "out", DType.BF16)


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path, source):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        import_gguf(source, target, DType.BF16)
    with pytest.raises(OutputError, match=r"did not write \(precious\)"):
        import_gguf(source, target, DType.BF16, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["precious"]
    import_gguf(source, tmp_path / "model", DType.BF16)
    with pytest.raises(OutputError, match="not empty"):
        import_gguf(source, tmp_path / "model", DType.F16)
    import_gguf(source, tmp_path / "model", DType.F16, overwrite=True)
    assert Checkpoint.open(tmp_path / "model").dtype is DType.F16
    with pytest.raises(OutputError):
        import_gguf(source, tmp_path, DType.BF16, overwrite=True)


def test_the_source_is_only_read_and_nothing_is_left_over(tmp_path, source):
    before = source.read_bytes()
    import_gguf(source, tmp_path / "out", DType.BF16)
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert needed <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_command_line(cli, tmp_path, source):
    made = cli("import-gguf", source, tmp_path / "out", "--dtype", "fp16")
    assert made.code == 0, made.err
    assert "LlamaForCausalLM, 2 layers, fp16" in made.out
    assert Checkpoint.open(tmp_path / "out").dtype is DType.F16
    assert cli("import-gguf", source, tmp_path / "bf16").code == 0
    assert Checkpoint.open(tmp_path / "bf16").dtype is DType.BF16
    ran = cli("run", tmp_path / "bf16", "--prompt", "the", "--max-new-tokens", 3, "--json")
    assert ran.code == 0, ran.err
    failed = cli("import-gguf", tmp_path / "absent.gguf", tmp_path / "x")
    assert failed.code == 2
    assert failed.err.startswith("eightfold: no file ")
