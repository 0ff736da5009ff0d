"""run_pa: its lines, their order, its answers, its report, and what it refuses."""

from __future__ import annotations

import ast
import csv
import json
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.server import benchmark
from examples.server.generate import AdmissionError, Batches, NoText, Request, Sizes, pages_for

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.tokenizer import Tokenizer
from examples import run_pa
from tests.conftest import CHAT_TEMPLATE, Result, write_model
from tests.engine.models import make

EXAMPLES = Path(run_pa.__file__).parent
QUESTION = "What's deep learning?"
IDLE = ("WORLD_SIZE", "ASCEND_RT_VISIBLE_DEVICES", "ATB_LLM_BENCHMARK_ENABLE", "ATB_LLM_BENCHMARK_FILEPATH")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("run_pa") / "model")


@pytest.fixture
def pa(model, monkeypatch, capsys) -> Callable[..., Result]:
    """Run run_pa with a model in this process; the time and level before each line are cut off."""
    for name in IDLE:
        monkeypatch.delenv(name, raising=False)

    def run(*args: object) -> Result:
        code = run_pa.main(["--model_path", str(model), "--max_input_length", "8", *map(str, args)])
        captured = capsys.readouterr()
        return Result(code, re.sub(r"^\[.*?\] \[\w+\] ", "", captured.out, flags=re.MULTILINE), captured.err)

    return run


def answer_to(model: Path, ids: list[int], count: int = 20) -> list[int]:
    return list(Decoder(Checkpoint.open(model)).generate(ids, count))


def answers(result: Result) -> list[str]:
    assert (result.code, result.err) == (0, "")
    found = re.findall(r"^Answer\[\d+\]: (.*?)\nGenerate\[", result.out, flags=re.MULTILINE | re.DOTALL)
    return [str(text) for text in found]


def refused(result: Result) -> str:
    assert result.code == 2
    assert "Answer" not in result.out
    (line,) = result.err.splitlines()
    return line.removeprefix("eightfold: ")


def test_events_come_in_the_order_of_the_original(pa, model):
    result = pa()
    (answer,) = answers(result)
    lines = result.out.replace(answer, "TEXT").splitlines()
    patterns = [
        r"hbm_capacity\(GB\): \d+\.\d\d, init_memory\(GB\): \d+\.\d\d",
        rf"pa_runner: PARunner\(model_path='{model}', max_batch_size=1, .*\)",
        "---------------begin warm_up---------------",
        "------total req num: 1, infer start--------",
        r"warmup_memory\(GB\): \d+\.\d\d",
        "---------------end warm_up---------------",
        "---------------begin inference---------------",
        "------total req num: 1, infer start--------",
        "---------------end inference---------------",
        r"Answer\[0\]: TEXT",
        r"Generate\[0\] token num: \(0, 20\)",
    ]
    warning = [line for line in lines if line == "input 0 is longer than max_input_length 8"]
    assert len(warning) == 1
    lines.remove(warning[0])
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_the_default_question_is_continued_greedily(pa, model):
    tokenizer = Tokenizer(model)
    ids = answer_to(model, tokenizer.encode(QUESTION))
    assert answers(pa("--ignore_eos")) == [tokenizer.decode(ids, keep_special=True)]


def test_one_prompt_is_copied_and_counts_add_up(pa):
    result = pa("--max_batch_size", 3, "--max_output_length", 4, "--ignore_eos", "--input_texts", "hello")
    assert len(set(answers(result))) == 1
    assert re.findall(r"token num: (\(.*\))", result.out) == ["(0, 4)", "(1, 8)", "(2, 12)"]


def test_several_prompts_may_exceed_the_batch_and_files_are_read(pa, model, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file")
    result = pa("--input_texts", "one", tmp_path / "prompt.txt", "three", "--ignore_eos", "--max_input_length", 16)
    tokenizer = Tokenizer(model)
    expected = [answer_to(model, tokenizer.encode(text)) for text in ("one", "from a file", "three")]
    assert answers(result) == [tokenizer.decode(ids, keep_special=True) for ids in expected]


def stopping_config(model: Path, tmp_path: Path, stop: int) -> Path:
    """Return the same model with another stop token."""
    copy = tmp_path / "stopping"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return copy


def test_an_answer_ends_with_its_stop_token_which_counts(pa, model, tmp_path):
    ids = answer_to(model, [1, 2, 3])
    position = next(i for i, token in enumerate(ids) if token not in ids[:i] and i >= 2)
    copy = stopping_config(model, tmp_path, ids[position])
    ended = pa("--model_path", copy, "--input_ids", "1,2,3", "--load_tokenizer", "False")
    assert answers(ended) == [str(torch.tensor(ids[: position + 1]))]
    assert f"token num: (0, {position + 1})" in ended.out
    went_on = pa("--model_path", copy, "--input_ids", "1,2,3", "--load_tokenizer", "False", "--ignore_eos")
    assert f"token num: (0, {len(ids)})" in went_on.out


def test_token_ids_need_no_tokenizer_and_answers_are_tensors(pa, tmp_path):
    bare = write_model(tmp_path / "bare", tokenizer=False)
    result = pa("--model_path", bare, "--input_ids", "1,2,3", "4,5", "--load_tokenizer", "False")
    assert "".join(answers(result)).count("tensor(") == 2


def test_input_dict_goes_first(pa):
    prompts = '[{"prompt": "one"}, {"prompt": "two", "adapter": "base"}]'
    both = pa("--input_dict", prompts, "--input_ids", "1", "--input_texts", "three", "--ignore_eos")
    assert answers(both) == answers(pa("--input_texts", "one", "two", "--ignore_eos"))


@pytest.mark.parametrize("how", ["text", "file", "the model's own"])
def test_chats_are_rendered_with_a_template(pa, model, tmp_path, how):
    template = CHAT_TEMPLATE if how == "the model's own" else "Q: {{ messages[0]['content'] }} A:"
    rendered = "<|user|>hi</s><|assistant|>" if how == "the model's own" else "Q: hi A:"
    (tmp_path / "other.jinja").write_text(template)
    option = {"text": template, "file": tmp_path / "other.jinja"}.get(how)
    extra = [] if option is None else ["--chat_template", option]
    result = pa("--is_chat_model", "--input_texts", "hi", "--ignore_eos", "--max_input_length", 32, *extra)
    tokenizer = Tokenizer(model)
    ids = answer_to(model, tokenizer.encode(rendered, special_tokens=False))
    assert answers(result) == [tokenizer.decode(ids, keep_special=True)]


def test_a_template_on_the_command_line_that_is_none_is_refused(pa):
    message = refused(pa("--is_chat_model", "--chat_template", "{% for %}"))
    assert message.startswith("chat template: got ")
    assert message.endswith(", expected a jinja2 template")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_examples_use_what_is_public(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    members = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    own = {node.attr for node in members if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert {node.attr for node in members} - own == set()


def test_a_file_of_chats_replaces_other_input(pa, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('[{"role": "user", "content": "hi"}]\n\n[{"role": "user", "content": "ho"}]\n')
    common = ("--is_chat_model", "--ignore_eos", "--max_input_length", 32)
    from_file = pa("--input_file", chats, "--input_texts", "x", *common)
    assert answers(from_file) == answers(pa("--input_texts", "hi", "ho", *common))


def test_the_context_can_be_changed(pa):
    long = ["--input_texts", "x" * 120, "--max_input_length", 130, "--ignore_eos"]
    assert refused(pa(*long)) == (
        "input 0: got 120 tokens and 20 new ones, expected at most 128 together. Shorten it, or lower "
        "--max_output_length."
    )
    assert len(answers(pa(*long, "--max_position_embeddings", 256))) == 1


def test_a_warm_up_longer_than_the_context_is_cut_to_it(pa):
    result = pa("--max_input_length", 1024, "--input_texts", "a")
    assert "warm-up prompts have 127 tokens, as the context has 128\n" in result.out


def test_infer_returns_texts_counts_and_seconds(model):
    runner = run_pa.PARunner(str(model), max_batch_size=2, max_output_length=3)
    texts, counts, seconds = runner.infer(["hello"], ignore_eos=True)
    assert len(texts) == 2
    assert counts == [(0, 3), (1, 6)]
    assert 0 < seconds < 60


# --- benchmark

COLUMNS = (
    "batch_size,input_seq_len,output_seq_len,e2e_time(ms),prefill_time(ms),decoder_token_time(ms),prefill_count,"
    "prefill_token_times,decode_token_times,prefill_average_time(ms)"
)


def test_the_benchmark_is_reported_and_written(pa, tmp_path, monkeypatch):
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.setenv("ATB_LLM_BENCHMARK_FILEPATH", str(tmp_path / "made" / "times.csv"))
    result = pa("--max_batch_size", 2, "--max_output_length", 5, "--ignore_eos", "--input_texts", "hello", "you", "all")
    # Once for the warm-up, once for the trial with 2 tokens, once for the answers.
    assert re.findall(r"total req num: (\d)", result.out) == ["2", "3", "3"]
    number = r" \d+\.\d\dms"
    assert re.search(
        f"Prefill time:{number}, Prefill average time:{number}, Decode token time:{number}, E2E time:{number}\n"
        "-------------------performance dumped------------------------\n",
        result.out,
    )
    path = tmp_path / "made" / "times.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    header, row, *more = list(csv.reader(path.read_text().splitlines()))
    assert (",".join(header), more) == (COLUMNS, [])
    values = dict(zip(header, row, strict=True))
    assert [values[name] for name in ("batch_size", "input_seq_len", "output_seq_len", "prefill_count")] == [
        "2",
        "5",
        "5",
        "2",
    ]
    prefills, decodes = ([float(x) for x in values[f"{kind}_token_times"].split(",")] for kind in ("prefill", "decode"))
    assert (len(prefills), len(decodes)) == (2, 8)
    for name, seconds in (
        ("prefill_time(ms)", sum(prefills)),
        ("prefill_average_time(ms)", sum(prefills) / 2),
        ("decoder_token_time(ms)", sum(decodes) / 4),
    ):
        assert re.fullmatch(r" \d+\.\d\d", values[name])
        # Each of at most 8 single times is rounded to 1e-6 s, the value to 0.01 ms.
        assert float(values[name]) == pytest.approx(1000 * seconds, abs=0.5e-3 * 8 + 0.005)
    assert float(values["e2e_time(ms)"]) >= 1000 * (sum(prefills) + sum(decodes)) - 0.02
    table = [line for line in result.out.splitlines() if line.startswith("| ")]
    assert [len(line.split("|")) for line in table] == [12, 12, 12]


def test_the_benchmark_goes_below_the_working_directory_by_default(pa, tmp_path, monkeypatch):
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.chdir(tmp_path)
    assert answers(pa("--max_output_length", 1, "--input_texts", "a"))
    assert (tmp_path / "benchmark_result" / "benchmark.csv").read_text().startswith(COLUMNS)


def test_the_report_is_for_owner_and_group_whatever_was_there(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("old and longer than what comes")
    path.chmod(0o666)
    benchmark.write_csv(path, {"a": "1", "b": "x,y"})
    assert path.read_text() == 'a,b\n1,"x,y"\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_benchmark_tries_two_tokens_first(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.setenv("ATB_LLM_BENCHMARK_FILEPATH", str(tmp_path / "times.csv"))
    runner = run_pa.PARunner(str(model), max_output_length=5)
    real, asked = runner.generate, []
    monkeypatch.setattr(
        runner, "generate", lambda requests, sizes: asked.append(sizes.max_new_tokens) or real(requests, sizes)
    )
    runner.infer(["hello"])
    assert asked == [2, 5]


def sizes(**changes: Any) -> Sizes:
    usual: dict[str, Any] = {
        "max_batch_size": 3, "max_prefill_batch_size": 3, "max_prefill_tokens": 800, "max_new_tokens": 8,
        "num_blocks": 18, "block_size": 128,
    }  # fmt: skip
    return Sizes(**{**usual, **changes})


def steps_of(batches: Batches, monkeypatch) -> list[tuple[int, int]]:
    """Return sequences and tokens of each step, as they come."""
    model, seen = batches.engine.model, list[tuple[int, int]]()
    real = model.run
    monkeypatch.setattr(
        model, "run", lambda step: seen.append((len(step.starts) - 1, len(step.token_ids))) or real(step)
    )
    return seen


@pytest.fixture
def batches(model) -> Batches:
    return Batches(Checkpoint.open(model), NoText(), pages=18, max_batch_size=3)


def requests_of(*lengths: int) -> list[Request]:
    rng = random.Random(3)
    return [Request(i, [rng.randrange(256) for _ in range(length)]) for i, length in enumerate(lengths)]


def test_a_batch_is_prefilled_together_and_shares_its_steps(batches, monkeypatch):
    seen = steps_of(batches, monkeypatch)
    timing = batches.generate(requests_of(5, 5, 5, 5), sizes(max_new_tokens=5))
    assert seen == [(3, 15), *[(3, 3)] * 4, (1, 5), *[(1, 1)] * 4]
    assert (len(timing.prefill), len(timing.decode)) == (2, 8)


@pytest.mark.parametrize("changes", [{"max_prefill_batch_size": 1}, {"max_prefill_tokens": 5}])
def test_prefills_are_as_small_as_asked_for(batches, monkeypatch, changes):
    seen = steps_of(batches, monkeypatch)
    timing = batches.generate(requests_of(5, 5), sizes(max_new_tokens=3, **changes))
    # The first request goes on while the second one is prefilled.
    assert seen == [(1, 5), (2, 6), (2, 2), (1, 1)]
    assert (len(timing.prefill), len(timing.decode)) == (2, 2)


def test_the_next_request_comes_in_when_one_has_left(batches, monkeypatch):
    requests = requests_of(5, 6, 7)
    alone = requests_of(5)
    batches.generate(alone, sizes(max_new_tokens=2))
    seen = steps_of(batches, monkeypatch)
    stops = frozenset({alone[0].out_tokens[0]})
    batches.generate(requests, sizes(max_batch_size=2, max_new_tokens=4, stop_ids=stops))
    assert requests[0].out_tokens == alone[0].out_tokens[:1]
    assert seen[:2] == [(2, 11), (2, 8)]


def test_answers_do_not_depend_on_company(tmp_path):
    small = make(tmp_path, "c8")
    batches = Batches(Checkpoint.open(small.directory), NoText(), pages=18, max_batch_size=3)
    together, alone = (requests_of(5, 700, 130, 1, 128, 40) for _ in range(2))
    timing = batches.generate(together, sizes())
    for request in alone:
        batches.generate([request], sizes())
    assert [r.out_tokens for r in together] == [r.out_tokens for r in alone]
    assert {len(r.out_tokens) for r in together} == {8}
    assert len(timing.prefill) == 4  # 5; 700 and 130 are too long together
    batches.engine.check_integrity()


def test_a_refusal_while_others_run_gives_their_cache_back(batches):
    with pytest.raises(AdmissionError, match=r"req: 2 out of memory, need block: 2 is more than free block 1"):
        batches.generate(requests_of(100, 100, 100), sizes(num_blocks=5, max_new_tokens=28, block_size=64))
    with pytest.raises(AdmissionError, match=r"req 2's  input length is 101, which is longer than max_prefill_tokens"):
        batches.generate(requests_of(9, 9, 101), sizes(max_prefill_tokens=100, max_prefill_batch_size=1))
    assert not batches.engine.has_unfinished
    assert batches.engine.blocks.available == batches.engine.blocks.total


@pytest.mark.parametrize(("block_size", "pages"), [(128, 6), (256, 12), (64, 3 + 2), (100, 5 + 2), (1, 1 + 2)])
def test_blocks_of_any_size_are_pages(block_size, pages):
    assert pages_for(6, block_size, sequences=2) == pages


def test_as_many_blocks_as_the_original_and_not_one_more(model):
    # ceil((300 + 20) / 128) blocks for each of 2 requests; the core's pages are as large as blocks.
    runner = run_pa.PARunner(str(model), max_batch_size=2, max_input_length=300, max_position_embeddings=512)
    assert runner.num_blocks == 6
    runner.warm_up()
    blocks = runner.generate.__self__.engine.blocks  # type: ignore[attr-defined]
    assert blocks.total == blocks.available == 6


def test_without_torch_answers_are_arrays(pa, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = pa("--input_ids", "1,2,3", "--load_tokenizer", "False", "--max_output_length", 2)
    assert re.fullmatch(r"\[ *\d+ +\d+\]", answers(result)[0])


@pytest.mark.parametrize("words", [[], ["--load_tokenizer", "False", "--input_ids", "1,2,3", "7"]])
def test_without_the_extension_the_reference_answers(pa, monkeypatch, words):
    native = answers(pa(*words, "--ignore_eos"))
    monkeypatch.setattr("eightfold.model.native.is_built", lambda: False)
    assert answers(pa(*words, "--ignore_eos")) == native


# --- what has no effect, and what is refused


def test_visible_devices_are_named_and_no_ranks(pa, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3")
    result = pa("--input_texts", "a", "--enable_atb_torch", "--trust_remote_code", "--dp", "1", "--tp", "-1")
    assert result.out.count("ASCEND_RT_VISIBLE_DEVICES=0,1,2,3 names NPUs; this runs on the CPU") == 1
    assert len(answers(result)) == 1


@pytest.mark.parametrize("size", [0, -1, 577])
def test_odd_block_sizes_warn(pa, size):
    result = pa("--block_size", size, "--input_texts", "a")
    assert f"block_size {size} is outside of 1 to 576\n" in result.out
    assert len(answers(result)) == 1


PARALLEL = "All processes that torchrun starts share the model by tensor parallelism; other ways are not made."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tp", "2"], f"--tp: got 2, expected -1 or 1. {PARALLEL}"),
        (["--moe_ep", "4"], f"--moe_ep: got 4, expected -1 or 1. {PARALLEL}"),
        (["--distributed_enable"], f"--distributed_enable. {PARALLEL}"),
        (["--is_embedding_model"], "--is_embedding_model: got True. It is not made."),
        (["--lora_modules", '{"a": "b"}'], "--lora_modules: got adapters, expected none. LoRA is not made."),
        (["--max_loras", "2"], "--max_loras: got 2. It is not made."),
        (["--max_lora_rank", "8"], "--max_lora_rank: got 8. It is not made."),
        (
            ["--input_dict", '[{"prompt": "a", "adapter": "b"}]'],
            "--input_dict: got adapter b. LoRA is not made.",
        ),
        (
            ["--input_dict", '{"prompt": 1}'],
            """--input_dict: got {"prompt": 1}, expected a list such as [{"prompt": "Hello"}]""",
        ),
        (["--input_dict", "[1]"], """--input_dict: got 1, expected an object such as {"prompt": "Hello"}"""),
        (["--kw_args", '{"a": 1}'], '--kw_args: got {"a": 1}, expected nothing. No such settings are known.'),
        (["--kw_args", "x"], "--kw_args: got x, expected a JSON object"),
        (["--kw_args", "x" * 4097], "--kw_args: got 4097 characters, expected at most 4096"),
        (["--input_file", "f"], "--input_file: got no --is_chat_model, expected both. Its lines are chats."),
        (["--input_file", "gone", "--is_chat_model"], "cannot read gone: No such file or directory. Check the path."),
        (
            ["--load_tokenizer", "False"],
            "--load_tokenizer: got False, and prompts that are texts, expected --input_ids alone",
        ),
        (["--max_output_length", "0"], "--max_output_length: got 0, expected at least 1"),
        (["--max_position_embeddings", "0"], "--max_position_embeddings: got 0, expected at least 1"),
        (["--max_prefill_tokens", "0"], "--max_prefill_tokens: got 0, expected -1, or at least 1"),
        (["--input_ids", "1,x"], "--input_ids: got '1,x', expected token ids such as 1,2,3. Try: {prog} --help"),
        (["--input_ids", "1,999"], "token id: got 999, expected 0 to 319"),
        (["--input_texts", ""], "input 0: got no tokens, expected at least one"),
        (
            ["--input_texts", "x" * 99],
            "req: 0 out of memory, need block: 2 is more than free block 1",
        ),
        (
            ["--input_texts", "x" * 40, "--max_prefill_tokens", "39"],
            "req 0's  input length is 40, which is longer than max_prefill_tokens 39",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(pa, args, message):
    sizes = ["--block_size", 100, "--max_prefill_tokens", 99] if "out of memory" in message else []
    assert refused(pa(*args, *sizes)) == message.replace("{prog}", "python -m examples.run_pa")


LIST = 'expected a list such as [{"role": "user", "content": "Hello"}]'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{}", f"got {{}}, {LIST}"),
        ("[]", f"got [], {LIST}"),
        ("not JSON", f"got not JSON, {LIST}"),
        ("[1]", "messages[0]: got 1, expected an object"),
        ('[{"role": "user"}]', "messages[0].content: got null, expected a text"),
    ],
)
def test_a_line_that_is_no_chat_is_named_by_its_number(pa, tmp_path, line, found):
    path = tmp_path / "chats.jsonl"
    path.write_text(f'[{{"role": "user", "content": "hi"}}]\n{line}\n')
    assert refused(pa("--is_chat_model", "--input_file", path)) == f"line 2 in {path}: {found}"


def test_a_directory_without_a_model_is_refused_as_by_eightfold(pa, cli, tmp_path):
    message = refused(pa("--model_path", tmp_path))
    assert cli("inspect", tmp_path).err == f"eightfold: {message}\n"


FLAGS = """
    model_path input_texts input_ids input_file input_dict max_prefill_batch_size max_batch_size max_input_length
    max_output_length max_position_embeddings max_prefill_tokens block_size chat_template ignore_eos is_chat_model
    is_embedding_model load_tokenizer enable_atb_torch trust_remote_code distributed_enable dp tp moe_tp pp
    microbatch_size moe_ep sp cp kw_args lora_modules max_loras max_lora_rank
"""


def test_every_flag_of_the_original_is_known():
    help_text = run_pa.build_parser("run_pa").format_help()  # type: ignore[attr-defined]
    for flag in FLAGS.split():
        assert f"--{flag}" in help_text
