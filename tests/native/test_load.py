"""Loading: what is refused and how, rotary frequencies, generation, and what is never imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.errors import CapacityError, CheckpointError, ConfigError, UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.layers import inverse_frequencies
from eightfold.model.native.load import _finish, load_model
from eightfold.model.native.model import PAGE, Chunk
from eightfold.model.reference import attention as reference_attention
from eightfold.model.reference.load import Decoder
from eightfold.rope import RopeParameters
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model
from tests.native import NAME
from tests.native.models import (
    DYNAMIC,
    ISAS,
    VARIANTS,
    Variant,
    answer_of,
    keys_and_values_in_bfloat16,
    logits_of,
    native,
    write_variant,
)


def one_line(raised: pytest.ExceptionInfo[Exception]) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("wanted", ["neon", "AVX2", "avx512_vnni"])
def test_an_instruction_set_that_is_not_known_is_refused(checkpoint_of, monkeypatch, wanted):
    monkeypatch.setenv("EIGHTFOLD_ISA", wanted)
    with pytest.raises(ConfigError) as raised:
        load_model(checkpoint_of("w8a8"), threads=1)
    assert one_line(raised) == (
        f"EIGHTFOLD_ISA: got {wanted}, expected {' or '.join(ISAS)}, which this CPU has. Unset it to take the best."
    )


def test_an_instruction_set_that_this_cpu_lacks_is_refused(checkpoint_of, monkeypatch):
    """As on a CPU that has nothing but scalar code."""
    monkeypatch.setattr(core.extension, "available_isas", lambda: ["scalar"])
    monkeypatch.setenv("EIGHTFOLD_ISA", "avx512")
    with pytest.raises(ConfigError) as raised:
        load_model(checkpoint_of("w8a8"), threads=1)
    assert one_line(raised) == (
        "EIGHTFOLD_ISA: got avx512, expected scalar, which this CPU has. Unset it to take the best."
    )


def test_without_a_choice_the_best_instruction_set_is_taken(checkpoint_of, monkeypatch):
    monkeypatch.delenv("EIGHTFOLD_ISA", raising=False)
    assert load_model(checkpoint_of("w8a8"), threads=1).isa == ISAS[-1]
    monkeypatch.setenv("EIGHTFOLD_ISA", "")
    assert load_model(checkpoint_of("w8a8"), threads=1).isa == ISAS[-1]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "٣", "1025", "99999999999999999999", " 2"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(checkpoint_of, monkeypatch, text):
    monkeypatch.setenv("EIGHTFOLD_THREADS", text)
    with pytest.raises(ConfigError, match=r"^EIGHTFOLD_THREADS: got .*, expected a number from 1 to 1024$") as raised:
        load_model(checkpoint_of("w8a8"))
    one_line(raised)


@pytest.mark.parametrize("threads", [0, -3, 1025])
def test_an_argument_for_threads_is_checked_too(checkpoint_of, threads):
    with pytest.raises(ConfigError, match=rf"^threads: got {threads}, expected a number from 1 to 1024$"):
        load_model(checkpoint_of("w8a8"), threads=threads)


def test_threads_are_as_asked_as_the_variable_says_or_one_for_each_cpu(checkpoint_of, monkeypatch):
    monkeypatch.setenv("EIGHTFOLD_THREADS", "3")
    assert load_model(checkpoint_of("w8a8")).threads == 3
    assert load_model(checkpoint_of("w8a8"), threads=2).threads == 2
    monkeypatch.delenv("EIGHTFOLD_THREADS")
    assert load_model(checkpoint_of("w8a8")).threads == core.extension.usable_cpus() >= 1


def test_where_no_more_threads_may_start_there_is_an_error_and_no_crash():
    code = (
        "import resource\n"
        "from tests.native import KERNELS\n"
        "KERNELS.pool_runs(2, [[1]])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"  # room for a few stacks
        "try:\n"
        "    KERNELS.pool_runs(1000, [[5]])\n"
        "except RuntimeError as error:\n"
        "    print('refused')\n"
        "print(KERNELS.pool_runs(1, [[5]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n[15]\n", "")


def test_a_missing_extension_is_one_line(checkpoint_of, monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)  # importing it raises
    assert not core.is_built()
    with pytest.raises(UnsupportedError) as raised:
        load_model(checkpoint_of("w8a8"))
    assert one_line(raised) == (
        "native backend: got no compiled extension "
        "(import of eightfold.model.native._core halted; None in sys.modules), "
        "expected one built when eightfold was installed. "
        "Install a C++ compiler and reinstall eightfold, or use --backend reference."
    )
    monkeypatch.undo()
    assert core.is_built()


def damaged(tmp_path: Path, name: str, suffix: str, value: float) -> Checkpoint:
    """Write a variant and put a value into the last element of the first tensor with a suffix."""
    directory = write_variant(tmp_path, VARIANTS[name]).directory
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    tensor = next(tensor for key, tensor in sorted(tensors.items()) if key.endswith(suffix))
    tensor.view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return Checkpoint.open(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("w8a16", "q_proj.weight_scale"),
        ("w8a16 asymmetric", "q_proj.weight_offset"),
        ("w8a8", "q_proj.input_scale"),
        ("w8a8", "down_proj.input_offset"),
        ("dynamic bias", "q_proj.bias"),
        ("bfloat16", "model.norm.weight"),
        ("w8a8 qk-norm", "q_norm.weight"),
        ("faquant", "fa_q.scale"),
        ("faquant", "fa_v.scale"),
        ("c8", "k_proj.kv_cache_scale"),
        ("c8 asymmetric", "v_proj.kv_cache_offset"),
    ],
)
def test_a_number_that_is_none_is_refused(tmp_path, name, suffix, value):
    checkpoint = damaged(tmp_path, name, suffix, value)
    message = rf"^[\w.]*{suffix}\[\d+(, 0)?\] in .*\.safetensors: got {value}, expected (a finite|a|an int8) number"
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(checkpoint, threads=1)
    one_line(raised)


def test_faquant_with_offsets_is_refused_as_the_reference_does(tmp_path):
    checkpoint = damaged(tmp_path, "faquant", "fa_k.offset", 3.0)
    message = r"^values of model\.layers\.0\.self_attn\.fa_k\.offset in .*: got 0 to 3, expected zeros\. Attention "
    with pytest.raises(UnsupportedError, match=message) as raised:
        load_model(checkpoint, threads=1)
    with pytest.raises(UnsupportedError) as of_reference:
        Decoder(checkpoint).attend(0)
    assert one_line(raised) == one_line(of_reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 514}, r"^head_dim in .*: got 514, expected at most 512\. Use --backend reference\.$"),
        (
            {"intermediate_size": 65_794},
            r"^inputs of a linear in .*: got 65794, expected at most 65793\. Use --backend ",
        ),
    ],
)
def test_shapes_beyond_the_limits_are_refused(tmp_path, changes, message):
    config = tiny_config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, **changes)
    checkpoint = Checkpoint.open(write_model(tmp_path / "float", config, tokenizer=False))
    with pytest.raises(UnsupportedError, match=message) as raised:
        load_model(checkpoint, threads=1)
    one_line(raised)


@pytest.mark.parametrize("changes", [{"head_dim": 512}, {"intermediate_size": 65_793}])
def test_shapes_at_the_limits_run(tmp_path, changes):
    config = tiny_config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, **changes)
    checkpoint = Checkpoint.open(write_model(tmp_path / "float", config, tokenizer=False))
    with keys_and_values_in_bfloat16():
        expected = Decoder(checkpoint).logits([1, 2, 3]).numpy()
    for isa in ISAS:
        model = native(checkpoint, isa)
        model.allocate_cache(128)
        tokens = np.array([1, 2, 3], np.int32)
        logits = np.zeros((3, 320), np.float32)
        model._model.forward(
            token_ids=tokens, positions=tokens - 1, generated=np.zeros(3, np.uint8), starts=np.array([0, 3], np.int32),
            tables=np.zeros((1, 1), np.int32), logit_tokens=tokens - 1, logits=logits, best=np.empty(3, np.int32),
            choice_tokens=tokens[:0], choices=tokens[:0].copy(),
        )  # fmt: skip
        # Sums of 65793 terms: sqrt(65793) roundings of 2**-24, and one step of a bfloat16 key or value.
        assert np.abs(logits - expected).max() <= (2 * 65793**0.5 * 2.0**-24 + 2.0**-8) * np.abs(expected).max()


ROPES = {
    "default": RopeParameters(),
    "large theta": RopeParameters(rope_theta=1e6),
    "linear": RopeParameters(rope_type="linear", factor=3.0),
    "llama3": RopeParameters(
        rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "llama3 short": RopeParameters(rope_type="llama3", factor=32.0, original_max_position_embeddings=64),
    "yarn": RopeParameters(rope_theta=1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn short": RopeParameters(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=64, beta_fast=4.0, truncate=False,
    ),
    "dynamic": RopeParameters(rope_type="dynamic", factor=4.0, original_max_position_embeddings=64),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [4, 6, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("longest", [64, 256])
def test_rotary_frequencies_are_the_references(rope, head_dim, longest):
    found = inverse_frequencies(ROPES[rope], head_dim, longest)
    expected = reference_attention.rotation(ROPES[rope], head_dim, longest).inv_freq.numpy()
    assert (found.dtype, found.shape) == (np.float32, (head_dim // 2,))
    # A power, which libraries round in their last bit, and up to four more roundings on either side.
    np.testing.assert_allclose(found, expected, rtol=12 * 2.0**-24, atol=0)


PROMPT = [1, 2, 3, 4, 5]


def sure_tokens(decoder: Decoder, prompt: list[int]) -> list[int]:
    """Return what the reference generates while its choice leads by more than 2 % of the largest logit.

    That is twice what a step of an integer was measured to move logits by; see test_model.py.
    """
    tokens = list(decoder.generate(prompt, 12))
    logits = decoder.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    best = logits.topk(2, dim=1).values
    is_close = (best[:, 0] - best[:, 1]) <= 0.02 * logits.abs().max()
    return tokens[: int(is_close.int().argmax())] if is_close.any() else tokens


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", ["bfloat16", "dynamic", "mix"])
def test_generation_is_the_references(tmp_path, architecture, name):
    config = tiny_config(architecture, sliding_window=4, use_sliding_window=True, max_window_layers=1)
    checkpoint = write_variant(tmp_path, Variant(VARIANTS[name].recipe, config))
    prompts = token_samples(6, seed=8)
    with keys_and_values_in_bfloat16():
        answers = [sure_tokens(Decoder(checkpoint), prompt) for prompt in prompts]
    assert sum(map(len, answers)) >= 8
    for isa in ISAS:
        model = native(checkpoint, isa, threads=2)
        for prompt, expected in zip(prompts, answers, strict=True):
            assert answer_of(model, prompt, len(expected)) == expected


def test_what_is_done_beside_loading_changes_no_bit(tmp_path):
    config = tiny_config(num_hidden_layers=9, vocab_size=2_000)  # three runs of pieces
    checkpoint = write_variant(tmp_path, Variant(VARIANTS["w8a8"].recipe, config))
    prompt, done = token_samples(1, seed=3)[0], list[float]()
    expected = logits_of(native(checkpoint, ISAS[-1], threads=3), prompt)
    for seconds in (0, 0, 0, 0.2):  # soon over, and longer than loading

        def beside(seconds: float = seconds) -> None:
            time.sleep(seconds)
            done.append(seconds)

        found = logits_of(native(checkpoint, ISAS[-1], threads=3, beside=beside), prompt)
        np.testing.assert_array_equal(found, expected)
    assert done == [0, 0, 0, 0.2]


class Slow:
    """A model of the core that takes as long as it is told; counts what it is asked for."""

    def __init__(self, threads: int = 2, error: BaseException | None = None) -> None:
        self.threads, self.error = threads, error
        self.asked: list[str] = []
        self.began, self.may_end = threading.Event(), threading.Event()

    def finish(self, forgets_head: bool) -> int:
        self.began.set()
        assert self.may_end.wait(30)
        self.asked.append("finish")
        if self.error is not None:
            raise self.error
        return 5

    def leave_alone(self, alone: bool) -> None:
        self.asked.append(f"alone {alone}")
        if not alone and len(self.asked) > 1:
            self.may_end.set()

    def abandon(self) -> None:
        self.asked.append("abandon")
        self.may_end.set()


@pytest.mark.parametrize(("threads", "alone"), [(2, True), (3, True), (4, False)])
def test_few_threads_leave_a_core_to_what_is_done_beside(threads, alone):
    model = Slow(threads)
    assert _finish(model, lambda: model.asked.append("beside")) == 5  # type: ignore[arg-type]
    assert model.asked == [f"alone {alone}", "beside", "alone False", "finish"]


@pytest.mark.parametrize("kind", [ConfigError, KeyboardInterrupt])
def test_what_fails_beside_loading_ends_it(kind):
    def beside() -> None:
        assert model.began.wait(30)
        raise kind("beside")

    model = Slow()
    with pytest.raises(kind, match="beside"):
        _finish(model, beside)  # type: ignore[arg-type]
    assert "abandon" in model.asked
    assert model.asked[-1] == "finish"  # nobody computes any more


def test_what_fails_at_once_keeps_the_core_from_beginning(monkeypatch):
    """As far as the other thread has not begun, which is stood for by one that begins when all is over."""
    begin: list[Callable[[], None]] = []
    monkeypatch.setattr("eightfold.model.native.load._thread.start_new_thread", lambda run, args: begin.append(run))
    model = Slow()
    with pytest.raises(ZeroDivisionError):
        _finish(model, lambda: 1 // 0)  # type: ignore[arg-type]
    begin[0]()
    assert model.asked == ["alone True", "abandon"]


def test_a_failure_of_the_core_is_told_also_when_something_is_done_beside():
    with pytest.raises(MemoryError):
        _finish(Slow(error=MemoryError()), lambda: None)  # type: ignore[arg-type]


def test_an_abandoned_model_is_not_made_ready(tmp_path, monkeypatch):
    """It ends before the next piece, so that even a damaged weight is not found."""
    models: list[Any] = []
    monkeypatch.setattr("eightfold.model.native.load._finish", lambda model, beside: models.append(model) or -1)
    for _ in range(2):
        load_model(damaged(tmp_path / str(len(models)), "bfloat16", "down_proj.weight", float("nan")), threads=2)
    models[1].abandon()
    assert models[0].finish(forgets_head=True) >= 0
    assert models[1].finish(forgets_head=True) == -1


def test_a_signal_while_weights_are_made_ready_ends_the_program_with_one_line(tmp_path):
    write_model(tmp_path / "m", tiny_config())
    code = """
import os, signal, sys, threading, time
import eightfold.model.native.load as load
from eightfold.__main__ import main

real = load._finish

class Slow:
    threads = 2

    def __init__(self, model):
        self.model, self.ends = model, threading.Event()

    def leave_alone(self, alone):
        if not alone:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def abandon(self):
        self.ends.set()

    def finish(self, **options):
        self.ends.wait()
        time.sleep(0.2)
        return self.model.finish(**options)

load._finish = lambda model, beside: real(Slow(model), beside)
sys.argv = ["eightfold", "run", "m", "--prompt", "x", "--backend", "native"]
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("eightfold: terminated: nothing was left half-written.")
    assert done.stderr.count("\n") == 1


def test_what_fails_beside_loading_is_told(checkpoint_of):
    def beside() -> None:
        raise ConfigError("tokenizer", got="none")

    with pytest.raises(ConfigError, match="tokenizer"):
        load_model(checkpoint_of("w8a8"), threads=2, beside=beside)


def test_a_damaged_weight_is_found_also_when_something_is_done_beside(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a finite number"):
        load_model(damaged(tmp_path, "bfloat16", "down_proj.weight", float("nan")), threads=2, beside=lambda: None)


def test_a_cache_beyond_the_memory_is_refused(checkpoint_of, monkeypatch):
    monkeypatch.setattr("eightfold.model.native.model.available_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError, match=r"^key/value cache: got \d+ MiB for \d+ positions, expected at most 1 MiB"):
        native(checkpoint_of("bfloat16"), ISAS[-1]).allocate_cache(1 << 20)


def test_loading_and_generating_import_nothing_heavy(checkpoint_of):
    code = (
        "import sys, pathlib, tests.native\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'gguf', 'safetensors')))\n"  # importing them raises
        "from eightfold.format.checkpoint import Checkpoint\n"
        "from eightfold.model.native.model import Chunk\n"
        "from eightfold.model.native.load import load_model\n"
        "model = load_model(Checkpoint.open(pathlib.Path(sys.argv[1])), threads=2)\n"
        "model.allocate_cache(3)\n"
        "model.forward([Chunk([1, 2, 3], 0, [0], 3)])\n"
        "heavy = ('torch', 'transformers', 'gguf', 'safetensors', 'tokenizers', 'jinja2', 'scipy')\n"
        "print([name for name in heavy if sys.modules.get(name)])\n"
    )
    path = os.pathsep.join([str(Path.cwd()), *sys.path])
    words = [sys.executable, "-c", code, str(checkpoint_of("w8a8").directory)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_weights_are_read_where_they_lie(tmp_path):
    """No copy: what changes in the mapped file changes the next step."""
    checkpoint = write_variant(tmp_path, VARIANTS["dynamic"])
    model = native(checkpoint, ISAS[-1])
    model.allocate_cache(128)
    chunk = Chunk(PROMPT, 0, [0], len(PROMPT))
    before = model.forward([chunk])[0].copy()
    file = next(checkpoint.directory.glob("*.safetensors"))
    header_len = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_len])
    begin, end = header["lm_head.weight"]["data_offsets"]
    with file.open("r+b") as out:
        out.seek(8 + header_len + begin)
        out.write(b"\0" * (end - begin))
    assert before.any()
    assert not model.forward([chunk])[0].any()


def test_the_scheme_of_a_token_is_the_one_asked_for(tmp_path):
    checkpoint = write_variant(tmp_path, VARIANTS["dynamic"])
    assert VARIANTS["dynamic"].recipe is not None and VARIANTS["dynamic"].recipe.scheme is DYNAMIC
    found = {}
    for mode in ("symmetric", "asymmetric"):
        with torch.inference_mode():
            expected = Decoder(checkpoint, dynamic=mode).logits(PROMPT)[-1]
        found[mode] = int(expected.argmax()), expected
        model = native(checkpoint, ISAS[-1], dynamic=mode)
        assert answer_of(model, PROMPT, 1) == [found[mode][0]]
    assert not torch.equal(found["symmetric"][1], found["asymmetric"][1])


def test_both_sides_of_the_border_mean_the_same_page():
    assert core.extension.PAGE == PAGE


BAD_MODELS: dict[str, dict[str, Any]] = {
    "num_layers: expected": {"num_layers": -1},
    "heads: expected": {"kv_heads": 0},
    "heads: expected a multiple": {"heads": 3},
    "heads: expected a multiple of kv_heads, up to 65536": {"heads": 131072},
    "head_dim: expected": {"head_dim": 0, "inv_freq": np.zeros(0, np.float32)},
    "hidden, intermediate, vocab: expected": {"hidden": [0, 0]},
    "rank: outside": {"rank": 1},
    "threads: expected": {"threads": 0},
}


@pytest.mark.parametrize("message", BAD_MODELS)
def test_sizes_are_checked_at_the_border_to_the_core(message):
    cuts: dict[str, Any] = {"hidden": [0, 8], "intermediate": [0, 8], "vocab": [0, 9], "rank": 0}
    shape: dict[str, Any] = {
        "num_layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 4,
        "inv_freq": np.ones(2, np.float32),
    }
    good: dict[str, Any] = {"isa": "scalar", "threads": 1, "eps": 1e-5, "symmetric_tokens": False, **cuts, **shape}
    core.extension.Model(**good)
    with pytest.raises(ValueError, match=message):
        core.extension.Model(**{**good, **BAD_MODELS[message]})
