"""The documents' command lines, typed into bash word for word, and what becomes of them."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from examples.convert.model_slim import quantifier
from examples.models.llama3 import convert_quant_weights as convert

from eightfold.config import parse_config
from eightfold.errors import UnsupportedError
from eightfold.families import all_linears
from tests.conftest import tiny_config, write_model
from tests.examples.conftest import ROOT, bash

SCRIPT = "examples/models/llama3/convert_quant_weights.py"
BOOLQ = ROOT / "examples" / "convert" / "model_slim" / "boolq.jsonl"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ATTENTION_PAGE = """
cd ${ATB_SPEED_HOME_PATH}
python examples/models/llama3/convert_quant_weights.py --model_path FLOAT --save_directory OUT --w_bit 8 --a_bit 8 \
--device_type npu --act_method 3 --anti_method m3 --disable_level L0 --calib_file BOOLQ --use_fa_quant True
"""

# The names as the page's shell function prints them: a blank first, one word for each, to be split by the shell.
W8A16_PAGE = """
cd ${ATB_SPEED_HOME_PATH}
disable_names=$(for i in 0 1 2 3 4; do
    for name in mlp.down_proj self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj \
        mlp.up_proj; do printf ' model.layers.%d.%s' $i $name; done
done; printf ' lm_head')
python examples/models/llama3/convert_quant_weights.py --model_path FLOAT --save_directory OUT \
--calib_file CALIB --disable_names $disable_names --device_type npu --a_bit 16 --w_sym False --mm_tensor False \
--anti_method m3 --act_method 3 --tokenizer_args TOKENIZER
"""
AS_PRINTED = r"{\"padding_side\":\"left\",\"pad_token\":\"<unk>\"}"
QUOTED = """'{"padding_side":"left","pad_token":"<unk>"}'"""
ESCAPED = r"{\"padding_side\":\"left\",\"pad_token\":\"\<unk\>\"}"

FIRST_FIVE = [
    f"model.layers.{layer}.{name}"
    for layer in range(5)
    for name in (
        "mlp.down_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
]


def line(template: str, **words: object) -> str:
    """Return a command line with its places filled in; words are quoted, except a TOKENIZER."""
    for name, word in words.items():
        template = template.replace(name, str(word) if name == "TOKENIZER" else shlex.quote(str(word)))
    return template


def no_names(args) -> list[str]:
    return []


def eightfold_line(argv: list[str], names=no_names) -> list[str]:
    """Return the eightfold command line of a typed one, from the command on."""
    return quantifier.quantize_arguments(quantifier.read_arguments(argv, "test", names))


def kept(words: list[str]) -> list[str]:
    return [name for option, name in pairwise(words) if option == "--keep-float"]


def without_kept(words: list[str]) -> list[str]:
    names = kept(words)
    return [word for word in words if word != "--keep-float" and word not in names]


# --- convert_quant_weights.py


def test_the_attention_page(typed, tmp_path):
    program, script, *argv = typed(line(ATTENTION_PAGE, FLOAT=tmp_path / "a b", OUT="o", BOOLQ=BOOLQ))
    assert (program, script) == ("python", SCRIPT)
    assert eightfold_line(argv) == [
        *("quantize", str(tmp_path / "a b"), "o", "--scheme", "w8a8", "--device", "npu", "--calib", str(BOOLQ)),
        *("--anti-outlier", "m3", "--act-method", "3", "--fa-quant"),
    ]


@pytest.mark.parametrize("tokenizer", [QUOTED, ESCAPED])
def test_the_w8a16_page(typed, tokenizer):
    command = line(W8A16_PAGE, FLOAT="f", OUT="o", TOKENIZER=tokenizer)
    calib = "$ATB_SPEED_HOME_PATH/examples/convert/model_slim/boolq.jsonl"
    _, script, *argv = typed(command.replace("CALIB", calib))
    assert script == SCRIPT
    words = eightfold_line(argv)
    assert kept(words) == [*FIRST_FIVE, "lm_head"]
    assert without_kept(words) == [
        *("quantize", "f", "o", "--scheme", "w8a16", "--device", "npu", "--no-weight-symmetric"),
        *("--calib", str(BOOLQ), "--anti-outlier", "m3"),
    ]


def test_the_w8a16_page_without_calibration_texts(typed):
    _, _, *argv = typed(line(W8A16_PAGE, FLOAT="f", OUT="o", TOKENIZER=QUOTED).replace("CALIB", '""'))
    words = eightfold_line(argv)
    assert "--calib" not in words
    assert words[-2:] == ["--anti-outlier", "m3"]


def test_bash_cuts_unquoted_tokenizer_args_at_the_comma(typed):
    _, _, *argv = typed(line(W8A16_PAGE, FLOAT="f", OUT="o", CALIB="c", TOKENIZER=ESCAPED))
    assert argv[-2:] == ['"padding_side":"left"', '"pad_token":"<unk>"']


def test_bash_itself_takes_unk_for_a_redirection(typed, tmp_path):
    # As printed, the page's line cannot start: bash looks for a file named unk before it looks for python.
    command = line(W8A16_PAGE, FLOAT="f", OUT="o", CALIB="c", TOKENIZER=AS_PRINTED)
    refused = bash(command, tmp_path, ATB_SPEED_HOME_PATH=str(tmp_path))
    assert "unk: No such file or directory" in refused.stderr
    # With such a file the line starts, and what is left of the last word is understood.
    (tmp_path / "unk").touch()
    _, _, *argv = typed(command, tmp_path, ATB_SPEED_HOME_PATH=str(tmp_path))
    assert argv[-1] == '{"padding_side":"left","pad_token":"'
    assert "--no-weight-symmetric" in eightfold_line(argv)


def config_file(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    return folder


def names_in(layers: int, *linears: str) -> set[str]:
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    return {f"model.layers.{layer}.{parts.get(name, 'mlp')}.{name}" for layer in range(layers) for name in linears}


DOWN = ("down_proj",)
OTHERS = LINEARS[:-1]
HEAD = {"lm_head"}
WIDE = {"hidden_size": 8192, "torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("changes", "a_bit", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, 8, names_in(7, *DOWN) | HEAD),
        ({"torch_dtype": "bfloat16"}, 16, names_in(7, *DOWN) | HEAD),
        ({**WIDE, "torch_dtype": "bfloat16"}, 8, names_in(7, *DOWN) | HEAD),
        ({**WIDE, "max_position_embeddings": 131072}, 8, names_in(7, *DOWN) | names_in(5, *OTHERS) | HEAD),
        ({**WIDE, "max_position_embeddings": 131072}, 16, names_in(7, *DOWN) | names_in(5, *OTHERS) | HEAD),
        ({**WIDE, "max_position_embeddings": 8192}, 16, names_in(5, *LINEARS) | HEAD),
        ({**WIDE, "num_hidden_layers": 3}, 16, names_in(3, *LINEARS) | HEAD),
        ({"torch_dtype": "float16"}, 8, names_in(7, *DOWN) | HEAD),
        ({"torch_dtype": "float16"}, 16, set()),
    ],
)
def test_without_names_the_original_keeps_these_float(changes, a_bit, expected):
    config = parse_config(tiny_config(**{"num_hidden_layers": 7, **changes}), Path("config.json"))
    names = convert.built_in_names(config, a_bit)
    assert len(names) == len(set(names))
    assert set(names) == expected <= set(all_linears(config))
    assert not names or names[-1] == "lm_head"


def test_the_built_in_list_is_for_a_line_without_names_only(tmp_path, capsys):
    folder = config_file(tmp_path / "float")
    paths = ["--model_path", str(folder), "--save_directory", "out"]
    assert len(kept(eightfold_line(paths, convert.default_names))) == 3
    assert "note: without --disable_names, 3 linears stay float" in capsys.readouterr().err
    assert kept(eightfold_line([*paths, "--disable_names", ""], convert.default_names)) == []
    assert kept(eightfold_line([*paths, "--disable_names", "a"], convert.default_names)) == ["a"]
    assert capsys.readouterr().err == ""


def test_an_unreadable_config_is_refused_with_one_line(tmp_path, capsys):
    folder = config_file(tmp_path / "float", architectures=["Unheard"])
    argv = ["--model_path", str(folder), "--save_directory", str(tmp_path / "out")]
    assert quantifier.run(argv, "convert", convert.default_names) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"eightfold: architecture in {folder / 'config.json'}: got Unheard")
    with pytest.raises(UnsupportedError):
        convert.default_names(quantifier.build_parser("convert").parse_args(argv))


def test_a_missing_model_is_refused_as_by_eightfold(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert"])
    argv = ["--model_path", str(tmp_path / "none"), "--save_directory", str(tmp_path / "out")]
    assert quantifier.run(argv, "convert", convert.default_names) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"eightfold: no directory {tmp_path / 'none'}")


# --- generate_quant_weight.sh

GENERATE = "bash examples/models/llama3/generate_quant_weight.sh"
COMMON = ("--device", "npu", "--calib", str(BOOLQ))


def settings(typed, folder: Path, kind: str, *more: str) -> list[str]:
    program, flag, module, *argv = typed(f"{GENERATE} -src {folder} -dst o -type {kind} {shlex.join(more)}")
    assert (program, flag, module) == ("python", "-m", "examples.convert.model_slim.quantifier")
    words = eightfold_line(argv)
    assert words[:4] == ["quantize", str(folder), "o", "--scheme"]
    return words[4:]


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        (
            "llama3.1_8b_w8a8",
            names_in(7, *DOWN),
            ["w8a8", *COMMON, "--anti-outlier", "m1", "--act-method", "1"],
        ),
        (
            "llama3.1_70b_instruct_fp16_w8a8",
            names_in(7, *DOWN) | names_in(5, *OTHERS),
            ["w8a8", *COMMON, "--anti-outlier", "m4", "--act-method", "3"],
        ),
        (
            "llama3.1_70b_instruct_bf16_w8a8",
            names_in(7, *DOWN),
            ["w8a8", *COMMON, "--anti-outlier", "m3", "--act-method", "3", "--disable-level", "L5"],
        ),
        (
            "llama3_70b_w8a16",
            names_in(5, *LINEARS),
            ["w8a16", *COMMON[:2], "--no-weight-symmetric", *COMMON[2:], "--anti-outlier", "m3"],
        ),
    ],
)
def test_each_type_has_the_settings_of_the_original(typed, tmp_path, kind, names, words):
    folder = config_file(tmp_path / "float", num_hidden_layers=7)
    found = settings(typed, folder, kind)
    assert set(kept(found)) == names | HEAD
    assert without_kept(found) == words


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-use_kvcache_quant", "True"], ["--kv-int8", "--kv-observe", "pre-rope"]),
        (["-use_fa_quant", "True"], ["--fa-quant"]),
        (["-use_kvcache_quant", "False", "-use_fa_quant", "False"], []),
        # The original loses the word behind -trust_remote_code.
        (["-trust_remote_code", "-use_kvcache_quant", "True"], ["--kv-int8", "--kv-observe", "pre-rope"]),
    ],
)
def test_switches_of_the_generate_script(typed, tmp_path, more, words):
    folder = config_file(tmp_path / "float")
    found = without_kept(settings(typed, folder, "llama3.1_8b_w8a8", *more))
    assert found == ["w8a8", *COMMON, "--anti-outlier", "m1", "--act-method", "1", *words]


def test_another_number_of_layers_is_said(tmp_path):
    folder = config_file(tmp_path / "float", num_hidden_layers=2)
    done = bash(f"PATH={tmp_path}:/usr/bin:/bin; {GENERATE} -src {folder} -dst o -type llama3.1_8b_w8a8 -dst")
    assert done.returncode == 1  # -dst without a value, before anything else
    assert done.stderr == "generate_quant_weight.sh: -dst needs a value.\n"
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exec "{sys.executable}" "$@"\n')
    stub.chmod(0o755)
    done = bash(f"PATH={tmp_path}:$PATH; {GENERATE} -src {folder} -dst o -type llama3.1_8b_w8a8")
    assert (done.returncode, done.stderr) == (
        0,
        "note: config.json says 2 layers, llama3.1_8b_w8a8 usually has 32: the layers of config.json are taken.\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "-src is missing. Try: generate_quant_weight.sh --help"),
        ("-src f -type t", "-dst is missing. Try: generate_quant_weight.sh --help"),
        ("-src f -dst o", "-type is missing. Try: generate_quant_weight.sh --help"),
        ("-src f -dst o -kind t", "unknown argument -kind. Try: generate_quant_weight.sh --help"),
        (
            "-src f -dst o -type t",
            "-type: got t, expected one of llama3.1_8b_w8a8, llama3.1_70b_instruct_fp16_w8a8, "
            "llama3.1_70b_instruct_bf16_w8a8, llama3_70b_w8a16.",
        ),
    ],
)
def test_the_generate_script_refuses_with_one_line_and_1(words, message):
    done = bash(f"{GENERATE} {words}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"generate_quant_weight.sh: {message}\n")


def test_the_generate_script_explains_itself():
    done = bash(f"{GENERATE} --help")
    assert done.returncode == 0
    assert "-use_kvcache_quant True|False" in done.stdout


# --- run_pa.sh

RUN_PA = ["-m", "examples.run_pa", "--model_path"]


@pytest.mark.parametrize("folder", ["llama", "llama3"])
def test_run_pa_sh_asks_for_20_tokens_unless_told(typed, tmp_path, folder):
    script = f"bash examples/models/{folder}/run_pa.sh"
    assert typed(f"{script} w") == ["python", *RUN_PA, "w", "--max_output_length", "20"]
    assert typed(f"{script} 'a b' 7") == ["python", *RUN_PA, "a b", "--max_output_length", "7"]
    more = ["--is_chat_model", "--input_texts", "a b"]
    assert typed(f"{script} w 7 {shlex.join(more)}")[-3:] == more
    # From anywhere, with paths as seen from there.
    assert typed(f"bash {ROOT}/examples/models/{folder}/run_pa.sh w", tmp_path)[4] == "w"


def test_processes_are_asked_for_by_their_own_variable(typed):
    script = "bash examples/models/llama3/run_pa.sh w 5"
    assert typed(script, ASCEND_RT_VISIBLE_DEVICES="0,1")[0] == "python"
    expected = ["torchrun", "--nproc_per_node", "2", "--master_port", "20030", *RUN_PA, "w", "--max_output_length", "5"]
    assert typed(script, EIGHTFOLD_WORLD_SIZE="2") == expected
    assert typed(script, EIGHTFOLD_WORLD_SIZE="2", MASTER_PORT="1234")[4] == "1234"


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        ("", "1", "the model directory is missing. Usage: run_pa.sh MODEL [MAX_OUTPUT_LENGTH]"),
        ("w", "two", "EIGHTFOLD_WORLD_SIZE: got two, expected a number of processes."),
    ],
)
def test_run_pa_sh_refuses_with_one_line_and_1(words, size, message):
    done = bash(f"bash examples/models/llama3/run_pa.sh {words}", EIGHTFOLD_WORLD_SIZE=size)
    assert (done.returncode, done.stderr) == (1, f"run_pa.sh: {message}\n")


# --- for real


def test_the_attention_page_for_real_and_its_chat_test(tmp_path):
    source = write_model(tmp_path / "float")
    command = line(ATTENTION_PAGE, FLOAT=source, OUT=tmp_path / "out", BOOLQ=BOOLQ)
    made = bash(command)
    assert made.returncode == 0, made.stderr
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (description["model_quant_type"], description["fa_quant_type"]) == ("W8A8", "FAQuant")
    assert description["model.layers.1.self_attn.q_proj.deq_scale"] == "W8A8"
    assert description["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    asked = bash(f"cd ${{ATB_SPEED_HOME_PATH}}; bash examples/models/llama/run_pa.sh {tmp_path / 'out'} 3")
    assert asked.returncode == 0, asked.stderr
    assert "Answer[0]: " in asked.stdout
    assert "Generate[0] token num: (0, 3)" in asked.stdout


def quantified(argv: list[str], capsys) -> str:
    """Run a typed command line in this process; return what it said on stderr."""
    code = quantifier.run(argv, "test")
    said = capsys.readouterr().err
    assert code == 0, said
    return str(said)


@pytest.mark.parametrize("calib", ["$ATB_SPEED_HOME_PATH/examples/convert/model_slim/boolq.jsonl", '""'])
def test_the_w8a16_page_for_real(typed, tmp_path, capsys, monkeypatch, calib):
    monkeypatch.setattr(sys, "argv", ["test"])
    source = write_model(tmp_path / "float", tiny_config(num_hidden_layers=6))
    command = line(W8A16_PAGE, FLOAT=source, OUT=tmp_path / "out", TOKENIZER=QUOTED).replace("CALIB", calib)
    said = quantified(typed(command)[2:], capsys)
    assert "note: pad_token <unk> is not in the vocabulary" in said
    assert ("--calib_file is empty and --anti_method m3 needs texts" in said) == (calib == '""')
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W8A16"
    assert description["model.layers.4.mlp.down_proj.weight"] == "FLOAT"
    assert description["model.layers.5.mlp.down_proj.weight_offset"] == "W8A16"


def test_the_generate_script_for_real(typed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])
    source = write_model(tmp_path / "float")
    command = f"{GENERATE} -src {source} -dst {tmp_path / 'out'} -type llama3.1_8b_w8a8 -use_kvcache_quant True"
    quantified(typed(command)[3:], capsys)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (description["model_quant_type"], description["kv_quant_type"]) == ("W8A8", "C8")
