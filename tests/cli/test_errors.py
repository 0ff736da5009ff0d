"""What the command line says when it is used wrongly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from eightfold.cli.main import COMMANDS
from tests.conftest import HEAD_DIM_NOTE, tiny_config, write_model
from tests.refusal import error_line, quantize_refused, refused

KEYS = "a text, or an object with inputs_pretokenized, text, prompt, messages, conversations or instruction"


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory) -> Path:
    """A float model that no test changes."""
    return write_model(tmp_path_factory.mktemp("shared") / "float")


def write(folder: Path, content: str | bytes, name: str = "data") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- calibration data; what files may hold is tested with the dataset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n  \n\t\n", "calibration file in {}: got no rows, expected one text a line, or JSON"),
        ('{"text": "a"}\n\n{"zz": 1}\n', "line 3 in {}: got an object with zz, expected " + KEYS),
        (b'\xef\xbb\xbf{"zz": 1}', "row 1 in {}: got an object with zz, expected " + KEYS),
        ('{"messages": [{"role": "user"}]}', "row 1 in {}: messages[0].content: got null, expected a text"),
        (b"fine\n\xff\n", "calibration file in {}: got byte 5 that is not UTF-8, expected UTF-8 text"),
        ('"\\ud800"',
         "calibration row 1 in {}: text: got character 0 that is not Unicode, expected text that UTF-8 can hold"),
    ],
)  # fmt: skip
def test_a_calibration_file_that_cannot_be_used_is_refused(cli, float_model, content, message):
    path = write(float_model.parent, content)
    assert quantize_refused(cli, float_model, "--calib", path, scheme="w8a8") == message.format(path)


@pytest.mark.parametrize("option", ["--calib", "--calib-ids"])
def test_a_calibration_file_that_cannot_be_read_is_named(cli, float_model, option):
    message = quantize_refused(cli, float_model, option, float_model.parent / "gone", scheme="w8a8")
    assert message == f"cannot read {float_model.parent}/gone: No such file or directory. Check the path."
    message = quantize_refused(cli, float_model, option, float_model.parent, scheme="w8a8")
    assert message.endswith(f"file in {float_model.parent}: got a directory, expected a file with text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "token id file in {}: got no rows, expected one JSON list a line"),
        ("[1, 2]\n[]", "line 2 in {}: got [], expected a JSON list of token ids, such as [1, 42]"),
        ("[1, 319]\n\n[1, 320]", "line 3 in {}: got token id 320, expected 0 to 319"),
        (b"\xfe\n", "token id file in {}: got byte 0 that is not UTF-8, expected UTF-8 text"),
    ],
)
def test_token_ids_that_cannot_be_used_are_refused(cli, float_model, content, message):
    path = write(float_model.parent, content)
    assert quantize_refused(cli, float_model, "--calib-ids", path, scheme="w8a8") == message.format(path)


def test_ids_may_stand_under_input_ids_and_behind_a_byte_order_mark(cli, tmp_path, shared_model):
    path = write(tmp_path, b'\xef\xbb\xbf[1, 2]\n{"input_ids": [0, 319]}\n')
    result = cli("quantize", shared_model, tmp_path / "out", "--scheme", "w8a8", "--calib-ids", path)
    assert result.code == 0, result.err


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--calib", "a", "--calib-ids", "b"], "--calib and --calib-ids"),
        (["--calib-texts", "a", "--calib-ids", "b"], "--calib-texts and --calib-ids"),
        (["--calib", "a", "--calib-texts", "b", "--calib-ids", "c"], "--calib and --calib-texts and --calib-ids"),
    ],
)
def test_calibration_data_from_two_places_is_refused(cli, float_model, scheme, options, named):
    message = quantize_refused(cli, float_model, *options, scheme=scheme)
    assert message == f"calibration data: got {named}, expected one of them"


@pytest.mark.parametrize(
    ("options", "named"), [(["--calib-limit", "3"], "--calib-limit"), (["--calib", "/nowhere"], "--calib")]
)
def test_calibration_options_that_change_nothing_are_noted(cli, tmp_path, shared_model, options, named):
    result = cli("quantize", shared_model, tmp_path / "out", "--scheme", "w8a16", "--anti-outlier", "none", *options)
    assert result.code == 0
    assert result.err == f"note: nothing here needs calibration data; {named} changes nothing.\n{HEAD_DIM_NOTE}"


# --- options


def usage_refused(cli: Any, *args: object, within: Path) -> str:
    """Run a command line that must be refused as such; return the message without the hint at its end."""
    message, _, program = refused(cli, *args, within=within).rpartition(" Try: ")
    known = [arg for arg in args if arg in COMMANDS][:1]
    assert program.endswith(" ".join(["eightfold", *known, "--help"]))
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--calib-limit", 0, "a whole number of at least 1"),
        ("--calib-limit", "x", "a whole number of at least 1"),
        ("--part-size-gb", 0, "a finite number above 0"),
        ("--part-size-gb", "nan", "a finite number above 0"),
        ("--memory", "much", "a size such as 2GiB or 500MB"),
        ("--device", "tpu", "cpu, cuda or npu"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_option(cli, float_model, option, value, expected):
    args = ("quantize", float_model, float_model.parent / "out", "--scheme", "w8a8", option, value)
    assert usage_refused(cli, *args, within=float_model.parent) == f"{option}: got {value}, expected {expected}."


@pytest.mark.parametrize("command", ["run", "eval"])
def test_numbers_of_other_commands_are_checked_too(cli, shared_model, command):
    option = {"run": "--max-new-tokens", "eval": "--chunk-len"}[command]
    prompt = ["--prompt", "x"] if command == "run" else []
    message = usage_refused(cli, command, shared_model, *prompt, option, 0, within=shared_model)
    assert message.startswith(f"{option}: got 0, expected a whole number of at least ")


def test_an_unknown_scheme_is_refused_with_the_known_ones(cli, float_model):
    args = ("quantize", float_model, float_model.parent / "out", "--scheme", "w4a16")
    message = usage_refused(cli, *args, within=float_model.parent)
    assert message == "--scheme: got w4a16, expected w8a8, w8a8-dynamic, w8a8-mix or w8a16."


def test_a_missing_scheme_is_asked_for_with_the_known_ones(cli, float_model):
    message = refused(cli, "quantize", float_model, float_model.parent / "out", within=float_model.parent)
    assert message == (
        "--scheme: got none, expected w8a8, w8a8-dynamic, w8a8-mix or w8a16. Give it, or a --recipe that does."
    )


def test_an_unknown_command_is_named(cli, tmp_path):
    assert usage_refused(cli, "quantise", within=tmp_path) == "command: got quantise, expected quantize."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frobnicate"], "option before the command: got --frobnicate, expected a known one."),
        (["inspect", "m", "--frobnicate"], "option: got --frobnicate, expected a known one."),
        (["run", "m", "--max-num-seq", "3"], "option: got --max-num-seq, expected --max-num-seqs."),
        (["run", "m", "-p", "3"], "option: got -p, expected a known one."),
        (["run", "m", "--prompt"], "--prompt: got no value, expected TEXT."),
        (["env", "--json=1"], "--json: got the value 1, expected none."),
        (["inspect", "m", "more"], "argument: got more, expected only DIR."),
        (["env", "more"], "argument: got more, expected none."),
    ],
)
def test_words_that_make_no_sense_are_named(cli, tmp_path, words, message):
    assert usage_refused(cli, *words, within=tmp_path) == message


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("env", "doctor", "completion")])
def test_a_command_without_its_arguments_asks_for_them(cli, tmp_path, command):
    assert usage_refused(cli, command, within=tmp_path).endswith(": got none, expected a path.")


@pytest.mark.parametrize(
    ("pattern", "suggested"),
    [
        ("*.mlp.down_prj", "'model.layers.1.mlp.down_proj'"),
        ("model.layers.0.self_attn.q_pro", "'model.layers.0.self_attn.q_proj'"),
        ("model.layers.2.*", "'model.layers.1.mlp.up_proj'"),
        ("zzz", "'*.mlp.down_proj'"),
        ("", "'*.mlp.down_proj'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_one_that_does(cli, float_model, pattern, suggested):
    message = quantize_refused(cli, float_model, "--keep-float", "lm_head", "--keep-float", pattern)
    assert message == (
        f"--keep-float: got {pattern!r}, which matches no linear, expected a name or pattern such as {suggested}"
    )


@pytest.mark.parametrize(("scheme", "called"), [("w8a8", "W8A8"), ("w8a8-dynamic", "W8A8_DYNAMIC")])
def test_asymmetric_weights_are_refused_where_activations_are_int8(cli, float_model, scheme, called):
    assert quantize_refused(cli, float_model, "--no-weight-symmetric", scheme=scheme) == (
        f"--no-weight-symmetric: got scheme {called}, expected W8A16. "
        "Schemes with int8 activations need symmetric weights."
    )


# --- tokenizer and chat template


@pytest.fixture
def bare_model(tmp_path) -> Path:
    """A float model without a tokenizer."""
    return write_model(tmp_path / "bare", tokenizer=False)


@pytest.mark.parametrize(
    "args",
    [["quantize", "{}", "{}-out", "--scheme", "w8a8"], ["run", "{}", "--prompt", "hello"], ["eval", "{}"]],
    ids=["quantize", "run", "eval"],
)
def test_a_missing_tokenizer_is_named_where_text_is_needed(cli, bare_model, args):
    message = refused(cli, *(arg.format(bare_model) for arg in args), within=bare_model.parent)
    assert message == (
        f"tokenizer.json in {bare_model}: got no such file, expected the model's tokenizer. "
        "Copy it from the float model, or give token ids."
    )


def test_a_lone_sentencepiece_model_is_pointed_out(cli, bare_model):
    (bare_model / "tokenizer.model").write_bytes(b"\n\x0e")
    # Without transformers and sentencepiece it says to install them; with them, that this is no such file.
    assert f"{bare_model}/tokenizer.model" in quantize_refused(cli, bare_model, scheme="w8a8")


def test_no_tokenizer_is_needed_without_text(cli, bare_model):
    out = bare_model.parent / "out"
    ids = write(bare_model.parent, "\n".join(str([*range(1, 129)]) for _ in range(4)))  # enough for sinks to show
    static = ["w8a8", "--target", "mindie", "--calib-ids", ids]
    for options in (["w8a16", "--calib", "none"], ["w8a8-dynamic", "--calib", "none"], static):
        result = cli("quantize", bare_model, out, "--overwrite", "--scheme", *options)
        assert result.code == 0, result.err
        assert result.err == (
            f"{HEAD_DIM_NOTE}note: the model has no tokenizer, and so OUT has none: MindIE and vllm-ascend need one.\n"
        )


def test_a_damaged_tokenizer_is_named(cli, float_model):
    (float_model / "tokenizer.json").write_text('{"version": "1.0"}')
    message = quantize_refused(cli, float_model, scheme="w8a8")
    assert message.startswith(f"tokenizer in {float_model}/tokenizer.json: got ")
    assert message.endswith(", expected a tokenizers file")


def chat(cli: Any, model: Path, prompt: str = "hello") -> str:
    return refused(cli, "run", model, "--chat", "--prompt", prompt, within=model)


def test_a_model_without_a_chat_template_cannot_chat(cli, float_model):
    (float_model / "chat_template.jinja").unlink()
    assert chat(cli, float_model) == (
        f"chat template in {float_model}: got none, expected chat_template.jinja or tokenizer_config.json's. "
        "This may be a base model: leave out --chat."
    )


def test_a_template_that_is_no_jinja_is_named(cli, float_model):
    (float_model / "chat_template.jinja").write_text("{% for message in messages %}")
    message = chat(cli, float_model)
    assert message.startswith(f"chat template in {float_model}: got ")
    assert message.endswith(", expected a jinja2 template")


def test_a_template_that_is_no_text_is_named(cli, float_model):
    (float_model / "chat_template.jinja").write_bytes(b"abc\xff")
    assert chat(cli, float_model) == (
        f"chat template in {float_model}/chat_template.jinja: got byte 3 that is not UTF-8, expected UTF-8 text"
    )


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{{ raise_exception('only system messages') }}", "only system messages"),
        ("{{ messages[5]['content'] }}", "list object has no element 5"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ messages + 1 }}", 'can only concatenate list (not "int") to list'),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_a_template_that_fails_is_no_crash(cli, float_model, template, got):
    (float_model / "chat_template.jinja").write_text(template)
    message = chat(cli, float_model)
    assert message == f"messages: got {got}, expected roles and contents that the chat template accepts"


def test_a_settings_file_that_is_no_object_is_named(cli, float_model):
    (float_model / "tokenizer_config.json").write_text("[]")
    (float_model / "chat_template.jinja").unlink()
    message = chat(cli, float_model)
    assert message == (
        f"JSON in {float_model}/tokenizer_config.json: got a list, expected a JSON object. Fetch the file again."
    )


# --- run


@pytest.mark.parametrize(("prompt", "new", "tokens"), [("x" * 129, 1, 129), ("x" * 65, 64, 65)])
def test_a_prompt_that_does_not_fit_the_context_is_refused(cli, shared_model, prompt, new, tokens):
    args = ("run", shared_model, "--prompt", prompt, "--max-new-tokens", new)
    assert refused(cli, *args, within=shared_model) == (
        f"prompt: got {tokens} tokens and {new} new ones, expected 1 to 128 together. "
        "Shorten the prompt or lower --max-new-tokens."
    )


def test_an_empty_prompt_is_refused(cli, shared_model):
    message = refused(cli, "run", shared_model, "--prompt", "", within=shared_model)
    assert message == "prompt: got no tokens, expected at least one. Give some text with --prompt."


def test_a_prompt_that_is_no_unicode_is_refused(cli, shared_model):
    # As Python shows bytes of the command line that are not UTF-8.
    args = ("run", shared_model, "--prompt", os.fsdecode(b"ab\xff"))
    assert refused(cli, *args, within=shared_model) == (
        "text: got character 2 that is not Unicode, expected text that UTF-8 can hold"
    )


# --- eval


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "text in {}: got nothing, expected some words"),
        (" \n\t", "text in {}: got nothing, expected some words"),
        (b"ab\xff", "text in {}: got byte 2 that is not UTF-8, expected UTF-8 text"),
        ("seven t", "text: got 7 tokens, expected at least one chunk of 8. Lower --chunk-len."),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(cli, tmp_path, shared_model, content, message):
    path = write(tmp_path, content)
    args = ("eval", shared_model, "--text", path, "--chunk-len", 8)
    assert refused(cli, *args, within=shared_model) == message.format(path)


def test_a_text_that_cannot_be_read_is_named(cli, tmp_path, shared_model):
    message = refused(cli, "eval", shared_model, "--text", tmp_path / "gone", within=tmp_path)
    assert message == f"cannot read {tmp_path}/gone: No such file or directory. Check the path."
    message = refused(cli, "eval", shared_model, "--text", tmp_path, within=tmp_path)
    assert message == f"text in {tmp_path}: got a directory, expected a file with text"


def test_models_of_different_vocabularies_are_not_compared(cli, tmp_path, shared_model):
    other = write_model(tmp_path / "other", tiny_config(vocab_size=330))
    args = ("eval", shared_model, "--against", other, "--chunks", 1, "--chunk-len", 4)
    assert refused(cli, *args, within=tmp_path) == (
        "vocabulary of --against: got 330, expected 320. Give the float original."
    )


def test_a_damaged_model_to_compare_with_is_found_before_anything_runs(cli, tmp_path, shared_model):
    assert refused(cli, "eval", shared_model, "--against", tmp_path / "gone", within=tmp_path) == (
        f"no directory {tmp_path}/gone: expected a model directory. Check the path."
    )


@pytest.mark.parametrize("command", ["run --prompt x", "chat", "serve", "bench", "eval", "inspect", "check"])
def test_a_wrong_path_is_told_in_the_same_words_by_every_command(cli, tmp_path, command):
    name, *options = command.split()
    assert refused(cli, name, tmp_path / "gone", *options, within=tmp_path) == (
        f"no directory {tmp_path}/gone: expected a model directory. Check the path."
    )


def test_debug_shows_a_traceback_before_the_line(cli, tmp_path):
    plain = error_line(cli("inspect", tmp_path / "gone"))
    result = cli("--debug", "inspect", tmp_path / "gone")
    lines = result.err.splitlines()
    assert result.code == 2
    assert lines[0] == "Traceback (most recent call last):"
    assert any("checkpoint.py" in line for line in lines)
    assert lines[-1] == f"eightfold: {plain}"
    assert sum(line.startswith("eightfold: ") for line in lines) == 1
