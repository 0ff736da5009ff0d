"""What `inspect` says of the compiled core is what the core does."""

from __future__ import annotations

import sys

import pytest

from eightfold.errors import ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.report.contents import describe_native
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model


def test_tiles_fit_the_registers():
    """Sums of a tile and a row of weights fit 16 registers, or the 32 of AVX-512; packed tokens fill whole lanes."""
    for isa in core.extension.isas():
        lanes, registers = {"scalar": (1, None), "avx2": (8, 16), "avx512": (16, 32)}[isa.name]
        assert isa.packed_tokens % lanes == 0
        if registers is not None:
            assert isa.weight_rows * max(isa.tokens, isa.float_tokens) + isa.weight_rows <= registers


@pytest.mark.parametrize(
    ("scheme", "by"),
    [
        (QuantType.W8A8, "int8 token, static scale"),
        (QuantType.W8A8_DYNAMIC, "int8 token, its own scale"),
        (QuantType.W8A8_MIX, "int8 token, its own scale in a prompt, static in an answer"),
        (QuantType.W8A16, "16-bit token, two int8 passes: high and low byte"),
    ],
)
def test_each_scheme_has_its_kernel(tmp_path, monkeypatch, scheme, by):
    monkeypatch.setenv("EIGHTFOLD_ISA", "scalar")
    source = write_model(tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "out", Recipe(scheme, keep_float=("*.0.mlp.down_proj",)), token_samples())
    native = describe_native(Checkpoint.open(tmp_path / "out"))
    assert [(k.modules, k.scheme, k.dtype, k.count) for k in native.kernels] == [
        ("linears", scheme.value, "I8", 13),
        ("linears", "FLOAT", "BF16", 2),  # that one and the head
        ("likeliest token", "FLOAT", "BF16", 1),
        ("attention", "FLOAT", "BF16", 2),
    ]
    int8, floating, choice, attention = (k.how for k in native.kernels)
    tiles = "4 rows x 6 tokens, or x 16 in lanes where a step has more than 8"
    assert int8 == f"plain integer products, {tiles}; {by}; exact int32 sums"
    assert choice == "plain integer products over an int8 copy, then the exact logits of all that may be the largest"
    assert floating == "plain float32 products over BF16 rows widened to float32, 4 rows x 4 tokens"
    assert attention == "plain float32 products; keys and values in bfloat16; softmax by pages of 128"


@pytest.mark.parametrize(
    ("options", "scheme", "by"),
    [
        ({"fa_quant": True}, "FAQuant", "queries, keys and values int8 by head, probabilities 7 bits"),
        ({"kv_int8": True}, "C8", "keys and values int8 by channel, queries and probabilities 16 bits"),
    ],
)
def test_int8_attention_has_its_kernel(tmp_path, options, scheme, by):
    source = write_model(tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A8, **options), token_samples())
    attention = describe_native(Checkpoint.open(tmp_path / "out")).kernels[-1]
    assert (attention.modules, attention.scheme, attention.dtype, attention.count) == ("attention", scheme, "I8", 2)
    assert by in attention.how


def test_a_tied_head_is_a_float_linear(tmp_path):
    source = write_model(tmp_path / "float", tiny_config(tie_word_embeddings=True))
    linears, *_ = describe_native(Checkpoint.open(source)).kernels
    assert (linears.scheme, linears.dtype, linears.count) == ("FLOAT", "BF16", 15)


def test_the_choice_and_its_reason(float_model, monkeypatch):
    checkpoint = Checkpoint.open(float_model)
    for name in (core.ISA_VARIABLE, core.THREADS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    native = describe_native(checkpoint)
    assert native.isa == native.available_isas[-1]
    assert (native.isa_reason, native.threads_reason) == (
        "the best this CPU has",
        "one for each CPU this process may use",
    )
    monkeypatch.setenv(core.ISA_VARIABLE, "scalar")
    monkeypatch.setenv(core.THREADS_VARIABLE, "7")
    native = describe_native(checkpoint)
    assert (native.isa, native.isa_reason) == ("scalar", "EIGHTFOLD_ISA says so")
    assert (native.threads, native.threads_reason) == (7, "EIGHTFOLD_THREADS says so")
    monkeypatch.setenv(core.ISA_VARIABLE, "mmx")
    with pytest.raises(ConfigError, match="EIGHTFOLD_ISA: got mmx, expected scalar"):
        describe_native(checkpoint)


def test_inspect_prints_the_choice_and_the_kernels(cli, float_model, monkeypatch):
    monkeypatch.setenv(core.ISA_VARIABLE, "scalar")
    monkeypatch.setenv(core.THREADS_VARIABLE, "7")
    lines = cli("inspect", float_model).out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  cpu "))
    assert lines[at].startswith("  cpu      scalar, EIGHTFOLD_ISA says so")
    assert lines[at + 1] == "  threads  7, EIGHTFOLD_THREADS says so"
    assert lines[at + 3].split() == ["computed", "scheme", "stored", "count", "by"]
    assert [line.split()[:4] for line in lines[at + 4 :]] == [
        ["linears", "FLOAT", "BF16", "15"],
        ["likeliest", "token", "FLOAT", "BF16"],
        ["attention", "FLOAT", "BF16", "2"],
    ]


def test_a_missing_extension_is_said_with_what_to_do(cli, float_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "eightfold.model.native._core", None)
    shown = cli("inspect", float_model)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[-1].startswith("  cpu      native backend: got no compiled extension (")
    assert "Install a C++ compiler and reinstall eightfold" in shown.out
    native = cli("inspect", float_model, "--json").json()["native"]
    assert native["problem"].startswith("native backend: ")
    assert native["kernels"] == []
