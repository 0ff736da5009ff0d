"""The files beside the weights: which travel, which stay, and what becomes of `auto_map`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from eightfold.errors import CheckpointError
from eightfold.files import write_json
from eightfold.format.directory import copy_files, list_sidecars, resolve_auto_map
from tests.conftest import HEAD_DIM_NOTE, tiny_config, write_model
from tests.refusal import quantize_refused

CARRIED = (
    "LICENSE",
    "LICENSE.md",
    "Licence.txt",
    "NOTICE",
    "USE_POLICY.md",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
LEFT = (
    ".gitattributes",
    ".hidden.json",
    "adapter_config.json",  # OUT would be taken for an adapter
    "params.json",
    "quantize_config.json",
    "README.md",
    "additional_chat_templates/notes.txt",
    "config.json",  # written anew
    "eightfold_notes.json",
    "figure.png",
    "model-00001-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_own.py",
    "original/params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quant_model_description.json",
    "quant_model_description_w8a8.json",
    "training_args.pt",
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A directory with one file of every name above, each with its own bytes."""
    for name in (*CARRIED, *LEFT):
        path = tmp_path / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}\r\n\xff".encode("latin-1"))
    return tmp_path / "m"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_exactly_the_companions_of_the_weights_are_listed(source):
    assert {str(path.relative_to(source)) for path in list_sidecars(source)} == set(CARRIED)


def test_companions_are_copied_byte_for_byte(source, tmp_path):
    (tmp_path / "out").mkdir()
    copy_files(list_sidecars(source), source, tmp_path / "out")
    assert names(tmp_path / "out") == set(CARRIED)
    assert [name for name in CARRIED if (tmp_path / "out" / name).read_bytes() != (source / name).read_bytes()] == []


def cache(tmp_path: Path) -> Path:
    """Return a snapshot in a Hugging Face cache."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "77").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/77")
    return snapshot


def test_a_link_into_the_cache_or_the_directory_becomes_a_file(tmp_path):
    snapshot = cache(tmp_path)
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "out").mkdir()
    copy_files(list_sidecars(snapshot), snapshot, tmp_path / "out")
    assert names(tmp_path / "out") == {"tokenizer.json", "vocab.json"}
    for copy in (tmp_path / "out").iterdir():
        assert (copy.is_symlink(), copy.read_text()) == (False, "tokens")
    (tmp_path / "latest").symlink_to(snapshot)
    assert len(list_sidecars(tmp_path / "latest")) == 2


@pytest.mark.parametrize("target", ["{tmp}/secret", "../../../secret", "/proc/self/environ", "../secret"])
def test_a_link_to_anywhere_else_is_refused_by_name(tmp_path, target):
    snapshot = cache(tmp_path)
    for place in (tmp_path, snapshot.parent):
        (place / "secret").write_text("of the user")
    (snapshot / "LICENSE").symlink_to(target.format(tmp=tmp_path))
    with pytest.raises(CheckpointError, match=r"^LICENSE in .*: got a link to /.*, expected a file of the model\."):
        list_sidecars(snapshot)


def test_a_folder_of_templates_elsewhere_is_refused(tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.jinja").write_text("of the user")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(CheckpointError, match=r"^additional_chat_templates/a\.jinja in .*: got a link to /"):
        list_sidecars(tmp_path / "m")


def test_what_is_no_file_and_what_points_nowhere_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match=r"^vocab\.json in .*: got a FIFO, expected a regular file$"):
        list_sidecars(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json in .*: got a link to \.\./blobs/gone, which is not"):
        list_sidecars(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model in .*: got a Git LFS pointer.* git lfs pull\.$"):
        list_sidecars(tmp_path)


def test_quantize_refuses_linked_companions_and_code_before_it_writes(cli, tmp_path):
    source = write_model(tmp_path / "m", tiny_config(auto_map={"AutoModel": "own.Own"}))
    (tmp_path / "secret").write_text("of the user")
    for name in ("LICENSE", "own.py"):
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(tmp_path / "secret")
        assert quantize_refused(cli, source).startswith(f"{name} in {source}: got a link to {tmp_path}/secret, ")
        (source / name).unlink()


def test_directories_with_the_name_of_a_companion_are_left(tmp_path):
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "vocab.json").mkdir()
    (tmp_path / "additional_chat_templates").touch()
    assert list_sidecars(tmp_path) == []


def test_quantize_carries_companions_and_nothing_else(cli, tmp_path):
    source = write_model(tmp_path / "m")
    for name in (*CARRIED, "README.md", "pytorch_model.bin", "modeling_own.py"):
        path = source / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(name)
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--calib", "none").code == 0
    made = {"config.json", "quant_model_description.json", "quant_model_weight_w8a16.safetensors"}
    made |= {"eightfold_report.json", "eightfold_journal.jsonl"}
    assert names(tmp_path / "out") == {*CARRIED, *made}
    rewritten = {"tokenizer_config.json"}  # for transformers 4 and 5
    assert rewritten >= {n for n in CARRIED if (tmp_path / "out" / n).read_bytes() != (source / n).read_bytes()}


# --- auto_map


@pytest.fixture
def code(tmp_path) -> Path:
    """A directory with two Python files, and one more above it."""
    (tmp_path / "m").mkdir()
    for path in ("evil.py", "m/modeling_own.py", "m/tokenization_own.py", "m/evil.py", "m/.py"):
        (tmp_path / path).write_text(f"# {path}")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        ({"AutoModel": "modeling_own.Own"}, ["modeling_own.py"]),
        ({"AutoModel": "modeling_own.A", "AutoConfig": "modeling_own.B"}, ["modeling_own.py"]),
        ({"AutoModel": "someone/repo--modeling_own.Own"}, ["modeling_own.py"]),
        ({"AutoTokenizer": ["tokenization_own.Slow", None]}, ["tokenization_own.py"]),
        ({"AutoTokenizer": [None, "tokenization_own.Fast"]}, ["tokenization_own.py"]),
        ({"AutoTokenizer": ["tokenization_own.A", "modeling_own.B"]}, ["modeling_own.py", "tokenization_own.py"]),
        ({}, []),
    ],
)
def test_a_map_whose_files_are_there_is_kept_with_them(code, auto_map, files):
    raw = {"auto_map": auto_map, "vocab_size": 1}
    assert resolve_auto_map(raw, code) == (raw, [code / name for name in files], None)


@pytest.mark.parametrize(
    ("target", "absent"),
    [
        ("modeling_gone.Own", "modeling_gone.py"),
        ("someone/repo--modeling_gone.Own", "modeling_gone.py"),
        ("../evil.Own", "../evil.py"),
        ("someone/repo--../evil.Own", "../evil.py"),
        ("sub/evil.Own", "sub/evil.py"),
        ("/tmp/evil.Own", "/tmp/evil.py"),
        ("evil..Own", "evil..py"),
        ("", ".py"),
        (7, ".py"),
        (["tokenization_own.Slow", "tokenization_gone.Fast"], "tokenization_gone.py"),
    ],
)
def test_a_map_whose_file_is_absent_or_elsewhere_is_left_out_with_a_note(code, target, absent):
    (code / ".py").unlink()
    raw = {"auto_map": {"AutoModel": "modeling_own.Own", "AutoTokenizer": target}, "vocab_size": 1}
    assert resolve_auto_map(raw, code) == (
        {"vocab_size": 1},
        [],
        f'config.json: "auto_map" left out, because {absent} is not in its directory',
    )
    assert "auto_map" in raw


@pytest.mark.parametrize("auto_map", [None, "modeling_own.Own", ["modeling_own.Own"]])
def test_what_is_no_map_brings_no_files(code, auto_map):
    raw = {"auto_map": auto_map}
    assert resolve_auto_map(raw, code) == (raw, [], None)


def test_quantize_carries_mapped_code_and_no_other(cli, tmp_path):
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    source = write_model(tmp_path / "m", tiny_config(auto_map=auto_map))
    (source / "modeling_own.py").write_text("raise SystemExit('never executed')")
    (source / "setup.py").touch()
    result = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--calib", "none")
    assert (result.code, result.err) == (0, HEAD_DIM_NOTE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == auto_map
    copy = tmp_path / "out" / "modeling_own.py"
    assert copy.read_bytes() == (source / "modeling_own.py").read_bytes()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert not (tmp_path / "out" / "setup.py").exists()


def test_quantize_says_that_it_left_a_map_out(cli, tmp_path):
    source = write_model(tmp_path / "m", tiny_config(auto_map={"AutoModelForCausalLM": "../evil.Own"}))
    (tmp_path / "evil.py").touch()
    (source / "evil.py").touch()
    result = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--calib", "none")
    assert result.code == 0
    left_out = 'note: config.json: "auto_map" left out, because ../evil.py is not in its directory\n'
    assert result.err == HEAD_DIM_NOTE + left_out
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "evil.py").exists()


def test_reports_of_equal_models_in_different_places_are_equal(cli, tmp_path):
    reports = []
    for place in ("a", "b/c"):
        source = write_model(tmp_path / place / "m", tiny_config(auto_map={"AutoModelForCausalLM": "gone.Own"}))
        assert cli("quantize", source, tmp_path / place / "out", "--scheme", "w8a16", "--calib", "none").code == 0
        reports.append((tmp_path / place / "out" / "eightfold_report.json").read_bytes())
    assert reports[0] == reports[1]
    assert b"gone.py" in reports[0]


# --- JSON


def test_json_is_indented_unescaped_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "f.json", {"a": ["é"]})
    assert (tmp_path / "f.json").read_text(encoding="utf-8") == '{\n    "a": [\n        "é"\n    ]\n}\n'


def test_half_a_surrogate_pair_survives_as_an_escape(tmp_path):
    write_json(tmp_path / "f.json", {"a": "\ud800"})
    assert (tmp_path / "f.json").read_bytes() == b'{\n    "a": "\\ud800"\n}\n'
    assert json.loads((tmp_path / "f.json").read_bytes()) == {"a": "\ud800"}
