"""Which backend computes, and that the two agree where a command shows it."""

from __future__ import annotations

import pytest

from eightfold.model import native as core
from tests.conftest import tiny_config, write_model


@pytest.fixture
def quantized(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config())
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a16", "--kv-int8", "--calib-limit", 4)
    assert made.code == 0, made.err
    return tmp_path / "out"


@pytest.fixture
def not_built(monkeypatch):
    """As after an installation without a compiler."""

    import_module = core.importlib.import_module  # type: ignore[attr-defined]

    def missing(name):
        if name == "eightfold.model.native._core":
            raise ImportError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(core.importlib, "import_module", missing)  # type: ignore[attr-defined]


def test_native_is_the_default(cli, quantized):
    assert cli("run", quantized, "--prompt", "hello", "--max-new-tokens", 2, "--json").json()["backend"] == "native"


def test_without_the_extension_the_reference_computes_and_says_so(cli, quantized, not_built):
    result = cli("run", quantized, "--prompt", "hello", "--max-new-tokens", 2, "--json")
    assert result.json()["backend"] == "reference"
    assert result.err.count("the native backend is not used: it was installed without a C++ compiler") == 1


def test_without_the_extension_native_is_refused(cli, quantized, not_built):
    result = cli("run", quantized, "--prompt", "hello", "--backend", "native")
    assert result.code == 2
    assert "native backend: got no compiled extension" in result.err
    assert "--backend reference" in result.err


def test_an_unknown_instruction_set_is_refused(cli, quantized, monkeypatch):
    monkeypatch.setenv("EIGHTFOLD_ISA", "mmx")
    result = cli("run", quantized, "--prompt", "hello")
    assert result.code == 2
    assert "EIGHTFOLD_ISA: got mmx, expected " in result.err


@pytest.mark.parametrize("tokens_as", ["prompt", "generated"])
def test_perplexities_agree(cli, quantized, tokens_as):
    words = ("--chunks", 2, "--chunk-len", 150, "--tokens-as", tokens_as, "--json")
    found = {b: cli("eval", quantized, *words, "--backend", b).json() for b in ("native", "reference")}
    assert found["native"]["backend"] == "native"
    assert ("ppl_mindie" in found["native"]) == (tokens_as == "prompt")
    for key in found["native"].keys() - {"seconds", "backend"}:
        # Keys of bfloat16 instead of float32, 16 bit of activations: 1e-3 of a logit near 1, averaged over 298 tokens.
        assert found["native"][key] == pytest.approx(found["reference"][key], rel=1e-3), key


def test_comparisons_agree(cli, quantized, float_model):
    words = ("--against", float_model, "--chunks", 2, "--chunk-len", 150, "--attention-mode", "cache", "--json")
    native, reference = (cli("eval", quantized, *words, "--backend", b).json() for b in ("native", "reference"))
    assert native.keys() == reference.keys()
    assert {"kl_mean", "kl_p99", "ppl_against", "top1_agreement"} <= native.keys()
    for key in ("nll", "ppl", "ppl_against"):  # as above
        assert native[key] == pytest.approx(reference[key], rel=1e-3), key
    # Both are means of many rounding errors, of which a few differ.
    assert native["kl_mean"] == pytest.approx(reference["kl_mean"], rel=0.1)
    assert native["top1_agreement"] == pytest.approx(reference["top1_agreement"], abs=0.02)


def test_models_of_other_vocabularies_are_not_compared(cli, quantized, tmp_path):
    other = write_model(tmp_path / "other", tiny_config(vocab_size=384))
    result = cli("eval", quantized, "--against", other, "--chunks", 1, "--chunk-len", 20)
    assert result.code == 2
    assert "vocabulary of --against: got 384, expected " in result.err


def test_a_cpu_without_vectors_is_pointed_out(cli, quantized, monkeypatch):
    words = ("run", quantized, "--prompt", "hello", "--max-new-tokens", 2)
    assert "plain C++" not in cli(*words).err
    monkeypatch.setattr(core.extension, "available_isas", lambda: ["scalar"])
    assert "note: this CPU has neither AVX2 nor AVX-512: plain C++ computes, which is slow." in cli(*words).err
