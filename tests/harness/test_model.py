"""`--model eightfold` of lm-eval: the same log-likelihoods and answers as transformers gives for the same model."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.conftest import tiny_config, write_model


def test_lm_eval_that_is_missing_is_named(monkeypatch, capsys):
    from eightfold.lm_eval.__main__ import main

    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    assert main() == 2
    assert capsys.readouterr().err == (
        "eightfold: lm-eval is not installed. Install it: pip install 'eightfold[lm-eval]'\n"
    )


@pytest.fixture
def pair(tmp_path):
    """Our model of lm-eval and transformers' model, of the same float directory."""
    pytest.importorskip("lm_eval")
    import torch
    from transformers import AutoModelForCausalLM

    from eightfold.lm_eval.model import EightfoldLM

    source = write_model(tmp_path / "float", tiny_config())
    oracle = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return EightfoldLM(str(source), batch_size=1, device="cpu"), oracle


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def likelihood(oracle, ids, wanted):
    import torch

    with torch.no_grad():
        rows = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    begin = len(ids) - wanted
    return sum(rows[at - 1, ids[at]].item() for at in range(begin, len(ids)))


def test_likelihoods_are_those_of_transformers(pair):
    model, oracle = pair
    found = model.loglikelihood([asked("the cat", " sat"), asked("", "on a mat")], disable_tqdm=True)
    whole, context = model.tok_encode("the cat sat"), model.tok_encode("the cat")
    assert found[0][0] == pytest.approx(likelihood(oracle, whole, len(whole) - len(context)), abs=0.02)
    alone = model.tok_encode("on a mat", add_special_tokens=False)
    assert found[1][0] == pytest.approx(likelihood(oracle, [model.prefix_token_id, *alone], len(alone)), abs=0.05)


def test_windows_of_a_long_text_add_up(pair):
    model, oracle = pair
    text = "abc " * 60
    ids = model.tok_encode(text)
    assert len(ids) > model.max_length
    (total,) = model.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    size = model.max_length - 1
    first, second = [model.prefix_token_id, *ids[:size]], ids[size:]
    context = ids[len(ids) - size - 1 : size]
    expected = likelihood(oracle, first, size) + likelihood(oracle, [*context, *second], len(second))
    assert total == pytest.approx(expected, rel=1e-3)


def test_answers_end_where_the_task_says(pair):
    model, _ = pair
    (whole,) = model.generate_until([asked("hello", {"until": [], "max_gen_toks": 12})], disable_tqdm=True)
    assert whole
    stop = whole[len(whole) // 2]
    (cut,) = model.generate_until([asked("hello", {"until": [stop, "</s>"], "max_gen_toks": 12})], disable_tqdm=True)
    assert cut == whole.partition(stop)[0]
