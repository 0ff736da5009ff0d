"""What each flag of MindIE's quantizer becomes on eightfold's command line, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples.convert.model_slim import quantifier

from eightfold.errors import EightfoldError
from tests.conftest import write_tokenizer

PROG = "quantifier"
PATHS = ["--model_path", "float", "--save_directory", "out"]


def parsed(*flags: str):
    args = quantifier.build_parser(PROG).parse_args([*PATHS, *flags])
    quantifier.refuse(args)
    return args


def translated(*flags: str) -> list[str]:
    """Return what stands behind the two directories."""
    words = quantifier.quantize_arguments(parsed("--calib_file", "c.jsonl", *flags))
    assert words[:3] == ["quantize", "float", "out"]
    return words[3:]


def refusal(*flags: str) -> str:
    with pytest.raises(EightfoldError) as caught:
        parsed(*flags)
    return str(caught.value)


CALIB = ["--calib", "c.jsonl"]
PLAIN = ["--anti-outlier", "none"]
STATIC = ["--scheme", "w8a8", "--device", "cpu", *CALIB, *PLAIN, "--act-method", "1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], STATIC),
        (["--device_type", "npu"], ["--scheme", "w8a8", "--device", "npu", *CALIB, *PLAIN, "--act-method", "1"]),
        (
            ["--w_bit", "8", "--a_bit", "8", "--is_dynamic", "True"],
            ["--scheme", "w8a8-dynamic", "--device", "cpu", *CALIB, *PLAIN],
        ),
        (["--a_bit", "16"], ["--scheme", "w8a16", "--device", "cpu", *CALIB, *PLAIN]),
        (
            ["--a_bit", "16", "--w_sym", "False", "--act_method", "3"],
            ["--scheme", "w8a16", "--device", "cpu", "--no-weight-symmetric", *CALIB, *PLAIN],
        ),
        (["--anti_method", "m3"], [*STATIC[:-4], "--anti-outlier", "m3", "--act-method", "1"]),
        (["--anti_method", ""], STATIC),
        (["--act_method", "3"], [*STATIC[:-1], "3"]),
        (["--disable_level", "L0"], STATIC),
        (["--disable_level", "L12"], [*STATIC, "--disable-level", "L12"]),
        (
            ["--disable_names", "model.layers.0.self_attn", "lm_head"],
            [
                *STATIC[:-4],
                "--keep-float",
                "model.layers.0.self_attn",
                "--keep-float",
                "lm_head",
                *PLAIN,
                "--act-method",
                "1",
            ],
        ),
        (
            ["--disable_names", " a  b"],
            [*STATIC[:-4], "--keep-float", "a", "--keep-float", "b", *PLAIN, "--act-method", "1"],
        ),
        (["--disable_names", ""], STATIC),
        (["--disable_last_linear", "False"], [*STATIC, "--quantize-lm-head"]),
        (
            ["--disable_last_linear", "False", "--disable_names", "lm_head"],
            [*STATIC[:-4], "--keep-float", "lm_head", *PLAIN, "--act-method", "1"],
        ),
        (["--use_fa_quant", "True"], [*STATIC, "--fa-quant"]),
        (["--use_fa_quant", "True", "--fa_amp", "2"], [*STATIC, "--fa-quant", "--fa-amp", "2"]),
        (["--use_fa_quant", "False", "--fa_amp", "0"], STATIC),
        (["--use_kvcache_quant", "True"], [*STATIC, "--kv-int8", "--kv-observe", "pre-rope"]),
        (["--part_file_size", "4"], [*STATIC, "--part-size-gb", "4"]),
        # No effect with 8-bit weights.
        (["--fraction", "0.02", "--sigma_factor", "3.5", "--group_size", "128", "--tp_size", "1"], STATIC),
        (
            ["--mm_tensor", "True", "--trust_remote_code", "--input_ids_name", "ids", "--attention_mask_name", "m"],
            STATIC,
        ),
        (
            ["--open_outlier", "True", "--co_sparse", "False", "--is_lowbit", "False", "--use_reduce_quant", "False"],
            STATIC,
        ),
    ],
)
def test_each_flag_becomes_the_option_that_does_the_same(flags, words):
    assert translated(*flags) == words


def test_texts_take_the_place_of_an_empty_calibration_file():
    words = quantifier.quantize_arguments(parsed("--calib_file", "", "--calib_texts", "one", "two words"))
    assert words[7:11] == ["--calib-texts", "one", "--calib-texts", "two words"]


def test_without_texts_an_empty_calibration_file_leaves_the_choice_to_eightfold():
    assert "--calib" not in quantifier.quantize_arguments(parsed("--calib_file", ""))


def test_the_default_calibration_file_lies_beside_the_script():
    words = quantifier.quantize_arguments(parsed())
    path = Path(words[words.index("--calib") + 1])
    assert path.name == "teacher_qualification.jsonl"
    assert path.is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w_bit", "4"], "--w_bit: got 4, expected 8. Only 8-bit weights are made."),
        (["--w_bit", "16"], "--w_bit: got 16, expected 8. Only 8-bit weights are made."),
        (["--co_sparse", "True"], "--co_sparse: got True, expected False. Sparse and low-bit weights are not made."),
        (["--is_lowbit", "True"], "--is_lowbit: got True, expected False. Sparse and low-bit weights are not made."),
        (["--do_smooth", "True"], "--do_smooth: got True, expected False. Sparse and low-bit weights are not made."),
        (["--use_sigma", "True"], "--use_sigma: got True, expected False. Sparse and low-bit weights are not made."),
        (
            ["--open_outlier", "False"],
            "--open_outlier: got False, expected True. Weights are scaled by channel, not by group.",
        ),
        (
            ["--use_reduce_quant", "True"],
            "--use_reduce_quant: got True, expected False. Quantized communication is not made.",
        ),
        (["--tp_size", "4"], "--tp_size: got 4, expected 1. Quantized communication is not made."),
        (["--anti_method", "m7"], "--anti_method: got m7, expected m1 to m6, or an empty word for none"),
        (["--disable_level", "5"], "--disable_level: got 5, expected L and a number, such as L5"),
        (["--disable_level", "L05"], "--disable_level: got L05, expected L and a number, such as L5"),
        (["--part_file_size", "0"], "--part_file_size: got 0, expected at least 1"),
        (["--fa_amp", "-1"], "--fa_amp: got -1, expected at least 0"),
        (["--fa_amp", "2"], "--fa_amp: got 2, expected 0. It belongs to --use_fa_quant True."),
        (
            ["--w_sym", "False"],
            "--w_sym: got False with --a_bit 8, expected True. int8 activations need symmetric weights.",
        ),
        (["--a_bit", "16", "--is_dynamic", "True"], "--is_dynamic: got True with --a_bit 16, expected --a_bit 8"),
        (
            ["--calib_file", "c", "--calib_texts", "t"],
            "--calib_texts: got texts, and --calib_file c, expected one of them. Add --calib_file ''.",
        ),
        (
            ["--tokenizer_args", '{"add_bos_token": false}'],
            "--tokenizer_args: got add_bos_token, expected padding_side, pad_token, pad_token_id, use_fast, legacy or "
            "trust_remote_code. Edit the model's tokenizer.json instead.",
        ),
        (
            ["--tokenizer_args", "left"],
            "--tokenizer_args: got left, expected a JSON object. Put it into single quotes.",
        ),
        (["--w_sym", "true"], f"--w_sym: got 'true', expected True or False. Try: {PROG} --help"),
        (["--use_fa_quant", "1"], f"--use_fa_quant: got '1', expected True or False. Try: {PROG} --help"),
    ],
)
def test_what_is_not_made_is_refused_by_name(flags, message):
    assert refusal(*flags) == message


@pytest.mark.parametrize("flags", [["--w_bit", "5"], ["--a_bit", "4"], ["--act_method", "4"], ["--device_type", "gpu"]])
def test_a_value_outside_of_the_choices_names_its_flag(flags):
    assert refusal(*flags).startswith(f"{flags[0]}: invalid choice: ")


# --- tokenizer_args


@pytest.mark.parametrize(
    "words",
    [
        ['{"padding_side":"left","pad_token":"<unk>"}'],
        ['"padding_side":"left"', '"pad_token":"<unk>"'],
        ['{"padding_side":"left",', '"pad_token":"<unk>"}'],
        ['{"padding_side":"left","pad_token":"'],
    ],
)
def test_tokenizer_args_are_put_together_again(words):
    if len(words) == 2 and words[0].startswith("{"):
        words = [" ".join(words)]  # a single word with a blank
    assert quantifier.parse_tokenizer_args(words) == {"padding_side": "left", "pad_token": "<unk>"}


def test_no_tokenizer_args_are_none():
    assert quantifier.parse_tokenizer_args(()) == quantifier.parse_tokenizer_args(["{}"]) == {}


# --- notes


def noted(*flags: str) -> list[str]:
    return quantifier.notes(parsed(*flags))


def test_flags_without_effect_are_noted():
    assert noted() == noted("--mm_tensor", "False") == []
    assert noted("--mm_tensor", "True")[0].startswith("--mm_tensor True changes nothing")
    assert noted("--trust_remote_code")[0].startswith("--trust_remote_code changes nothing")
    assert "took <unk> for a redirection" in noted("--tokenizer_args", '{"pad_token":"')[0]


def test_the_texts_of_eightfold_are_noted():
    assert noted("--calib_file", "", "--anti_method", "m3") == [
        "--calib_file is empty and --anti_method m3 needs texts: those of eightfold are used."
    ]
    assert noted("--calib_file", "") == []
    assert noted("--calib_file", "", "--calib_texts", "t", "--anti_method", "m3") == []


def test_a_pad_token_that_the_vocabulary_lacks_is_noted_and_taken(tmp_path):
    write_tokenizer(tmp_path)
    args = quantifier.build_parser(PROG).parse_args(
        ["--model_path", str(tmp_path), "--save_directory", "out", "--tokenizer_args", '{"pad_token":"<unk>"}']
    )
    quantifier.refuse(args)
    assert quantifier.notes(args) == [
        "pad_token <unk> is not in the vocabulary; that changes nothing, as texts are taken one by one."
    ]
    args.tokenizer_args = ['{"pad_token":"</s>"}']
    assert quantifier.notes(args) == []


# --- the files


@pytest.mark.parametrize(("name", "rows"), [("boolq.jsonl", 50), ("teacher_qualification.jsonl", 26)])
def test_calibration_files_hold_one_text_a_line(name, rows):
    lines = (quantifier.HERE / name).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["inputs_pretokenized"] for line in lines]
    assert len(texts) == len(set(texts)) == rows
    assert all(text.endswith(("\nAnswer:", "\n答案：")) for text in texts)


def test_the_help_names_every_flag_and_the_form_of_tokenizer_args():
    text = " ".join(quantifier.build_parser(PROG).format_help().split())
    for flag in vars(parsed()):
        assert f"--{flag}" in text
    assert """'{"padding_side":"left","pad_token":"<unk>"}'""" in text
