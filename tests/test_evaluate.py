"""Perplexity and the distance from the float model, against the same numbers computed the long way."""

from __future__ import annotations

import codecs
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eightfold import evaluate as measuring
from eightfold.errors import ConfigError, InputError
from eightfold.evaluate import cut_chunks, default_text, read_evaluation_text
from eightfold.evaluate import evaluate_reference as evaluate
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model
from tests.refusal import error_line

# Logits of the tiny models are below 16 and carry up to 38 roundings of 2**-24 each way (tests/reference has the
# count); a log-probability is a logit minus a log-sum of them and at most doubles that.
NATS = 2 * 2 * 38 * 2**-24 * 16


# Of a divergence between near models logit noise moves only the second order. What is left are the roundings of the
# log-probabilities themselves, below 16 in size, two for each model and value, weighted by probabilities.
KL_NATS = 4 * 2**-24 * 16


def float_decoder(directory: Path, seed: int = 0) -> Decoder:
    return Decoder(Checkpoint.open(write_model(directory, seed=seed, tokenizer=False)))


def quantized(source: Path, target: Path, scheme: QuantType = QuantType.W8A8_DYNAMIC) -> Decoder:
    quantize_checkpoint(source, target, Recipe(scheme), token_samples())
    return Decoder(Checkpoint.open(target))


def some_chunks(count: int = 3, length: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 320, (count, length), generator=generator).tolist()


def numpy_log_probs(decoder: Decoder, chunks: list[list[int]]) -> np.ndarray:
    """Return (positions, V) float64 log-probabilities of every position that predicts something, chunk by chunk."""
    rows = []
    for chunk in chunks:
        logits = decoder.logits(chunk).numpy().astype(np.float64)[:-1]
        top = logits.max(1, keepdims=True)
        rows.append(logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True)))
    return np.concatenate(rows)


def targets(chunks: list[list[int]]) -> np.ndarray:
    return np.array([token for chunk in chunks for token in chunk[1:]])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_perplexity_is_transformers_loss(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    directory = write_model(tmp_path / "float", tiny_config(architecture), tokenizer=False)
    chunks = some_chunks()
    found = evaluate(Decoder(Checkpoint.open(directory)), chunks)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    ids = torch.tensor(chunks)
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    assert found.nll == pytest.approx(loss, abs=NATS)
    assert found.ppl == pytest.approx(math.exp(loss), rel=NATS)
    assert (found.tokens, found.chunks) == (3 * 19, 3)
    assert found.ppl_against is found.kl_mean is found.kl_p99 is found.top1_agreement is None


def test_perplexity_is_its_formula(tmp_path):
    decoder, chunks = float_decoder(tmp_path / "float"), some_chunks()
    logp = numpy_log_probs(decoder, chunks)
    nll = -logp[np.arange(len(logp)), targets(chunks)].mean()
    found = evaluate(decoder, chunks)
    assert found.nll == pytest.approx(nll, abs=NATS)
    assert found.ppl == math.exp(found.nll)


def test_a_model_is_no_distance_from_itself(tmp_path):
    decoder, chunks = float_decoder(tmp_path / "float"), some_chunks()
    found = evaluate(decoder, chunks, decoder)
    assert found.kl_mean == 0
    assert found.kl_p99 == 0
    assert found.top1_agreement == 1
    assert found.ppl_against == found.ppl


@pytest.mark.parametrize("scheme", [QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16])
@pytest.mark.parametrize(("count", "length"), [(3, 20), (1, 2), (8, 21)])
def test_distance_from_the_float_model_is_its_formula(tmp_path, scheme, count, length):
    against = float_decoder(tmp_path / "float")
    judged = quantized(tmp_path / "float", tmp_path / "out", scheme)
    chunks = some_chunks(count, length)
    found = evaluate(judged, chunks, against)
    q, p = numpy_log_probs(judged, chunks), numpy_log_probs(against, chunks)
    kl = (np.exp(p) * (p - q)).sum(1)
    # Nearest rank: the smallest value that at least 99 of 100 do not exceed, in integers to be exact.
    nearest_rank = np.sort(kl)[-(-99 * len(kl) // 100) - 1]
    assert found.tokens == len(kl) == count * (length - 1)
    assert found.kl_mean == pytest.approx(kl.mean(), abs=KL_NATS)
    assert found.kl_p99 == pytest.approx(nearest_rank, abs=KL_NATS)
    assert found.top1_agreement == (q.argmax(1) == p.argmax(1)).mean()
    assert found.ppl_against == pytest.approx(np.exp(-p[np.arange(len(p)), targets(chunks)].mean()), rel=NATS)
    assert found.nll == pytest.approx(-q[np.arange(len(q)), targets(chunks)].mean(), abs=NATS)
    assert count == 1 or found.kl_mean > 10 * KL_NATS


def test_the_divergence_is_that_of_the_judged_model_from_the_float_one_and_not_the_reverse(tmp_path):
    first, second = float_decoder(tmp_path / "a", seed=0), float_decoder(tmp_path / "b", seed=1)
    chunks = some_chunks(1)
    forward, backward = evaluate(first, chunks, second), evaluate(second, chunks, first)
    p, q = numpy_log_probs(second, chunks), numpy_log_probs(first, chunks)
    # Two strangers: a KL of several nats, to which each of 320 terms adds its own noise; a relative bound then.
    assert forward.kl_mean == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-5)
    assert backward.kl_mean == pytest.approx((np.exp(q) * (q - p)).sum(1).mean(), rel=1e-5)
    assert abs(forward.kl_mean - backward.kl_mean) > 1e-3
    assert forward.ppl == pytest.approx(backward.ppl_against, rel=NATS)


@pytest.mark.parametrize("positions", [1, 2, 99, 100, 101, 199, 200, 201, 1000])
def test_the_99th_percentile_is_the_nearest_rank(positions):
    kl = np.linspace(0.1, 3, positions)
    nothing = np.zeros(positions)
    found = measuring.Positions([nothing], [nothing], [nothing], [nothing], [np.random.default_rng(0).permutation(kl)])
    assert found.average(1).kl_p99 == kl[-(-99 * positions // 100) - 1]


@pytest.mark.parametrize("head_tokens", [1, 2, 5, 18, 19, 20, 1000])
def test_how_many_logits_are_held_at_a_time_changes_nothing(tmp_path, monkeypatch, head_tokens):
    against = float_decoder(tmp_path / "float")
    judged = quantized(tmp_path / "float", tmp_path / "out")
    chunks = some_chunks()
    whole = evaluate(judged, chunks, against)
    monkeypatch.setattr(measuring, "_STEP_TOKENS", head_tokens)
    cut = evaluate(judged, chunks, against)
    # The head's products of other sizes may be summed in another order.
    assert cut.nll == pytest.approx(whole.nll, abs=NATS)
    assert cut.kl_mean == pytest.approx(whole.kl_mean, abs=KL_NATS)
    assert cut.kl_p99 == pytest.approx(whole.kl_p99, abs=KL_NATS)
    assert (cut.tokens, cut.top1_agreement) == (whole.tokens, whole.top1_agreement)


def test_each_chunk_stands_alone(tmp_path):
    decoder, chunks = float_decoder(tmp_path / "float"), some_chunks()
    together = evaluate(decoder, chunks)
    alone = [evaluate(decoder, [chunk]).nll for chunk in chunks]
    assert together.nll == pytest.approx(sum(alone) / len(alone), abs=NATS)


def test_each_layer_of_each_model_and_each_chunk_is_announced(tmp_path):
    decoder, calls = float_decoder(tmp_path / "float"), list[int]()
    evaluate(decoder, some_chunks(1), decoder, lambda: calls.append(1))
    assert len(calls) == 2 + 2 + 1


def test_models_of_different_vocabularies_are_not_compared(tmp_path):
    decoder = float_decoder(tmp_path / "a")
    other = Decoder(Checkpoint.open(write_model(tmp_path / "b", tiny_config(vocab_size=300), tokenizer=False)))
    with pytest.raises(ConfigError) as failure:
        evaluate(decoder, some_chunks(1), other)
    assert str(failure.value) == "vocabulary of `against`: got 300, expected 320. Give the float original."


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="token id: got 320"):
        evaluate(float_decoder(tmp_path / "a"), [[1, 320]])


def test_a_hopeless_model_has_an_infinite_perplexity(tmp_path):
    # exp(nll) leaves float64 at 710 nats: logits of thousands, as of a model with damaged weights.
    decoder = float_decoder(tmp_path / "a")
    directory = write_model(tmp_path / "b", tokenizer=False)
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, directory / "model.safetensors")
    hopeless = Decoder(Checkpoint.open(directory))
    found = evaluate(hopeless, some_chunks(), decoder)
    assert found.nll > 710
    assert found.ppl == math.inf
    assert evaluate(decoder, some_chunks(), hopeless).ppl_against == math.inf


# --- chunks and texts


def test_chunks_are_the_first_ones_of_the_text_one_after_the_other():
    assert cut_chunks(range(10), 2, 3) == [[0, 1, 2], [3, 4, 5]]
    assert cut_chunks(range(10), 3, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_chunks(range(10), 40, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]  # what is left over is not used
    assert cut_chunks(range(4), 1, 4) == [[0, 1, 2, 3]]
    assert cut_chunks(range(4), 9, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("tokens", [0, 1, 511])
def test_a_text_shorter_than_a_chunk_is_refused(tokens):
    with pytest.raises(InputError) as failure:
        cut_chunks(range(tokens), 40, 512)
    assert str(failure.value) == f"text: got {tokens} tokens, expected at least one chunk of 512. Lower `chunk_len`."


@pytest.mark.parametrize(("chunks", "length"), [(1, 1), (1, 0), (0, 2), (-1, 2), (1, -5)])
def test_chunks_that_predict_nothing_are_refused(chunks, length):
    with pytest.raises(ConfigError, match=rf"chunks: got {chunks} of {length} tokens, expected at least 1 of"):
        cut_chunks(range(100), chunks, length)


def test_a_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\r\nb\n ü".encode())
    assert read_evaluation_text(path) == "a\r\nb\n ü"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"ab\xff", r"text in .*got byte 2 that is not UTF-8"), (b"", "got nothing"), (b" \n\t", "got nothing")],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_evaluation_text(path)


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*Check the path\.$"):
        read_evaluation_text(tmp_path / "absent")
    for path, got in ((tmp_path, "a directory"), (Path("/dev/zero"), "a device")):
        with pytest.raises(InputError, match=f"^text in .*: got {got}, expected a file with text$"):
            read_evaluation_text(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_of_json_the_texts_are_measured_and_not_its_brackets(tmp_path, indent):
    rows = [{"inputs_pretokenized": "one two", "label": 1}, {"messages": [{"role": "user", "content": "three"}]}]
    (tmp_path / "text").write_text(json.dumps(rows, indent=indent))
    assert read_evaluation_text(tmp_path / "text") == "one two\n\nuser: three"
    (tmp_path / "text").write_text("\n".join(map(json.dumps, rows)))
    assert read_evaluation_text(tmp_path / "text") == "one two\n\nuser: three"
    (tmp_path / "text").write_text('{"label": 1}')
    with pytest.raises(InputError, match=r"row 1 in .*: got an object with label, expected a text, or an object with"):
        read_evaluation_text(tmp_path / "text")
    (tmp_path / "text").write_text("[a link](there)\n42\n")
    assert read_evaluation_text(tmp_path / "text") == "[a link](there)\n42\n"


def test_a_byte_order_mark_is_no_text_and_of_a_large_text_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_TEXT_BYTES", 8)
    for content in (codecs.BOM_UTF8 + "grüüün".encode(), "grü".encode("utf-16")):
        (tmp_path / "text").write_bytes(content)
        assert read_evaluation_text(tmp_path / "text") == "grü"


def test_the_default_text_fills_the_chunks_it_promises():
    # 12 x 512 tokens, and vocabularies of today put 4 to 5 characters of English prose into a token.
    assert len(default_text()) > 12 * 512 * 4.5


@pytest.mark.golden
def test_the_default_text_fills_twelve_chunks_of_a_real_vocabulary(smol):
    from eightfold.tokenizer import Tokenizer

    token_ids = Tokenizer(smol / "smol-bf16").encode(default_text(), special_tokens=False)
    assert len(cut_chunks(token_ids, 12, 512)) == 12


def test_a_token_that_a_model_lacks_is_refused(cli, float_model, tmp_path):
    path = float_model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    more = [
        {"id": 261 + i, "content": f"<{i}>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True} for i in range(100)
    ]  # fmt: skip
    path.write_text(json.dumps({**tokenizer, "added_tokens": tokenizer["added_tokens"] + more}))
    (tmp_path / "text").write_text("a<99>")
    message = error_line(cli("eval", float_model, "--chunk-len", 2, "--text", tmp_path / "text"))
    assert re.fullmatch(
        rf"text in {tmp_path}/text: got token id 3\d\d, expected 0 to 319, which {float_model} knows\. "
        r"The tokenizer of DIR has a token that a model lacks\.",
        message,
    )
