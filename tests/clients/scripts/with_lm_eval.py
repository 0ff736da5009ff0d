"""EleutherAI's lm-evaluation-harness with its model local-completions, on two tasks of a few lines."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY=os.environ["EIGHTFOLD_API_KEY"])
os.environ.setdefault("HF_HOME", tempfile.mkdtemp())

import lm_eval
from lm_eval.tasks import TaskManager

from report import KEY, MODEL, URL, Report

report = Report("lm-eval", "lm-eval")
folder = Path(tempfile.mkdtemp())
CHOICES = [
    {"text": "The capital of France is", "choices": ["Paris", "a banana", "seven"], "gold": 0},
    {"text": "Two plus two is", "choices": ["purple", "four", "London"], "gold": 1},
    {"text": "def add(a, b):\n    return", "choices": ["while while", "zebra", "a + b"], "gold": 2},
]
NUMBERS = [
    {"text": "1, 2, 3,", "gold": "4"},
    {"text": "5, 6, 7,", "gold": "8"},
]


def write_task(name, rows, **settings):
    """Write a task and its rows; the files are JSON, which YAML reads."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"test_split": "test", "doc_to_text": "{{text}}", "metadata": {"version": 1}, **settings}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def metric(name, **values):
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True, **values}]


write_task(
    "choices", CHOICES, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold",
    metric_list=metric("acc"),
)  # fmt: skip
write_task(
    "numbers", NUMBERS, output_type="generate_until", doc_to_target="gold", metric_list=metric("exact_match"),
    generation_kwargs={"until": [",", "\n"], "max_gen_toks": 8, "do_sample": False},
    filter_list=[{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
)  # fmt: skip


def evaluate(task, **settings):
    """Return a task's results and every answer's log-probabilities or texts."""
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"base_url": f"{URL}/completions", "model": MODEL, "max_length": 2048, "max_retries": 1, **settings},
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return found["results"][task], [sample["resps"] for sample in found["samples"][task]]


HERE = {"tokenizer_backend": "huggingface", "tokenizer": os.environ["EIGHTFOLD_TOKENIZER"]}
THERE = {"tokenizer_backend": "auto", "auth_token": KEY}  # auto: the server's own, if it has what that needs


@report.capability("log-likelihoods")
def _():
    results, scores = evaluate("choices", **HERE)
    assert results["acc,none"] == 1, results
    assert evaluate("choices", batch_size=3, **HERE)[1] == scores  # the same, several in a request
    return results


@report.capability("texts")
def _():
    results, texts = evaluate("numbers", **HERE)
    assert results["exact_match,none"] == 1, texts
    assert evaluate("numbers", tokenized_requests=False, **HERE)[1] == texts
    return texts


@report.capability("the server's tokenizer")
def _():
    from lm_eval.utils import check_remote_tokenizer_support

    assert check_remote_tokenizer_support(f"{URL}/completions", auth_token=KEY)
    for task in ("choices", "numbers"):
        assert evaluate(task, **THERE) == evaluate(task, **HERE)
    return "the same results"
