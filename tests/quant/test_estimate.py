"""--plan: bytes are exact, time is that of real layers times their number, and nothing is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time

import pytest

from eightfold.errors import OutputError, kept_work, remember_kept
from eightfold.format.checkpoint import Checkpoint
from eightfold.quant import estimate
from eightfold.quant.budget import budget_for
from eightfold.quant.estimate import estimate_run
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.refusal import error_line

M4_FA = Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4, fa_quant=True)
RECIPES = {
    "w8a16 with int8 head": Recipe(QuantType.W8A16, quantize_lm_head=True),
    "w8a8 m4 fa": M4_FA,
    "dynamic kv": Recipe(QuantType.W8A8_DYNAMIC, kv_int8=True),
    "mix levels": Recipe(QuantType.W8A8_MIX, disable_level=15),
    "fa m3, patterns of later layers": Recipe(
        QuantType.W8A16,
        anti_outlier=AntiOutlier.M3,
        fa_quant=True,
        fa_amp=4,
        keep_float=("model.layers.4.*",),
        modules=(("model.layers.3.mlp.*", QuantType.W8A8_DYNAMIC),),
    ),
    "float32": Recipe(QuantType.W8A8_DYNAMIC, save_float32=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "float", tiny_config(num_hidden_layers=5))


def plan(source, recipe, samples=(), **words):
    words = {"target": source.parent / "out", "memory": None, **words}
    return estimate_run(Checkpoint.open(source), recipe, samples, **words)


def test_an_interrupted_plan_does_not_promise_to_go_on(source, monkeypatch):
    def interrupted(*args, **words):
        error = KeyboardInterrupt()
        remember_kept(error, "2 of 3 layers are finished.")
        raise error

    monkeypatch.setattr(estimate, "quantize_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        plan(source, Recipe(QuantType.W8A16))
    assert not kept_work(stop.value)
    assert [path.name for path in source.parent.iterdir()] == ["float"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_its_bytes_are_those_of_the_run_and_it_leaves_nothing(source, tmp_path, recipe):
    found = plan(source, recipe, token_samples())
    if not recipe.decides_by_comparison:  # else it counts as quantized what the run keeps float
        outcome = quantize_checkpoint(source, tmp_path / "made", recipe, token_samples())
        assert found.output_bytes == outcome.nbytes
    assert found.total("written_bytes") == found.output_bytes
    names = [phase.phase for phase in found.phases]
    compares = ["float pass"] if recipe.decides_by_comparison else []
    assert names == ["start", "open", "embedding", *compares, "layers", "head", "finish"]
    assert all(phase.seconds > 0 for phase in found.phases)
    assert [path.name for path in source.parent.iterdir()] == ["float"]
    json.dumps(found.as_json(), allow_nan=False)


def test_a_layer_counts_for_all_and_its_tokens_in_proportion(source, monkeypatch):
    def run(model, target, recipe, samples, anti_samples, *, progress):
        now.append(now[-1] + 2)
        with progress("quantize to W8A8", 3, "layer") as task:
            for step, seconds in (("embedding", 1), ("layer 0", 50), ("layer 1", 30), ("layer 2", None), ("head", 4)):
                task.at(step)
                # Weights take 0.5 s, and a token 0.01 s.
                now.append(now[-1] + (0.5 + 0.01 * sum(map(len, samples)) if seconds is None else seconds))
        now.append(now[-1] + 3)

    now = [0.0]
    monkeypatch.setattr(estimate, "quantize_checkpoint", run)
    monkeypatch.setattr(time, "perf_counter", lambda: now[-1])
    monkeypatch.setattr(estimate, "_process_seconds", lambda: 7.0)
    monkeypatch.setattr(estimate, "_MOST_TOKENS", 200)
    samples = [[1] * 20] * 50
    seconds = {phase.phase: phase.seconds for phase in plan(source, M4_FA, samples).phases}
    layers = pytest.approx(5 * (0.5 + 0.01 * 1000))
    assert seconds == {"start": 7, "open": 2, "embedding": 1, "layers": layers, "head": 4, "finish": 3}


def test_hidden_states_that_do_not_fit_are_in_files(source):
    samples = [[7] * 20] * 500
    budget = budget_for(Checkpoint.open(source), M4_FA, samples)
    roomy = plan(source, M4_FA, samples, memory=1 << 40)
    tight = plan(source, M4_FA, samples, memory=budget.needed + budget.states // 2)
    assert (roomy.spills, tight.spills) == (False, True)
    # 10,000 tokens in the float and the quantized stream; on disk also one sample in the smoothed one
    assert roomy.peak_bytes - tight.peak_bytes == pytest.approx(4 * 48 * 20_000, abs=64 << 20)
    assert roomy.disk_bytes == tight.disk_bytes == roomy.output_bytes + 3 * 4 * 48 * 20_020 + (64 << 20)


def test_what_does_not_fit_is_said(source, monkeypatch):
    monkeypatch.setattr(estimate, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    found = plan(source, Recipe(QuantType.W8A16), memory=1)
    assert not found.fits_memory
    assert not found.fits_disk
    assert found.refusal.startswith("memory budget: got 1 bytes, expected at least ")
    assert "\n".join(found.render()).count("DOES NOT FIT") == 2


def test_a_place_that_cannot_be_written_is_refused(source, monkeypatch):
    def fail(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("eightfold.quant.estimate.fcntl.flock", fail)
    with pytest.raises(OutputError, match=r"^cannot write to .*: Permission denied. Choose a directory you may write"):
        plan(source, Recipe(QuantType.W8A16))


def test_the_command_line_shows_it_and_writes_nothing(cli, source, tmp_path):
    out = tmp_path / "out"
    shown = cli("quantize", source, out, "--scheme", "w8a16", "--plan")
    lines = shown.out.splitlines()
    assert (shown.code, lines[0].split()) == (0, ["phase", "time", "read", "write"])
    assert [line.split()[0] for line in lines[1:7]] == ["start", "open", "embedding", "layers", "head", "finish"]
    document = cli("quantize", source, out, "--scheme", "w8a16", "--plan", "--json").json()
    assert document["fits_disk"] is True
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_plan_has_left_is_removed_by_the_next(source):
    for name in (".out.partial", "out"):  # what was not finished, and what was and could not be removed
        left = source.parent / ".out.plan" / name
        left.mkdir(parents=True)
        (left / "quant_model_weight.safetensors").write_bytes(b"half")
    plan(source, Recipe(QuantType.W8A16))
    assert [path.name for path in source.parent.iterdir()] == ["float"]


def test_two_plans_of_one_output_do_not_disturb_each_other(source):
    place = source.parent / ".out.plan"
    place.mkdir()
    folder = os.open(place, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match=r"cannot write to .*\.out\.plan: another plan at work"):
            plan(source, Recipe(QuantType.W8A16))
        assert place.is_dir()
    finally:
        os.close(folder)
        place.rmdir()


@pytest.mark.parametrize("name", ["w8a16 with int8 head", "w8a8 m4 fa"])
def test_a_plan_and_a_run_name_one_least_memory_and_it_is_enough(cli, source, tmp_path, name):
    options = {"w8a16 with int8 head": ("--scheme", "w8a16", "--quantize-lm-head"), "w8a8 m4 fa": ("--scheme", "w8a8")}
    command = ("quantize", source, tmp_path / "out", *options[name])
    refused = error_line(cli(*command, "--memory", "1MiB"))
    planned = cli(*command, "--memory", "1MiB", "--plan", "--json").json()
    number = re.compile(r"at least (\d+) MiB")
    assert number.sub("", planned["refusal"]) == number.sub("", refused.replace("--memory", "`memory`"))
    named = int(number.search(refused)[1])
    assert planned["peak_mib"] == int(number.search(planned["refusal"])[1])
    assert abs(planned["peak_mib"] - named) <= 64  # what a process has when it begins is rounded up to so many
    least = f"{min(planned['peak_mib'], named)}MiB"
    assert cli(*command, "--memory", least, "--plan", "--json").json()["fits_memory"]
    assert cli(*command, "--memory", least).code == 0
