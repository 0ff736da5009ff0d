"""--plan: bytes are exact, times and memory add up from what was measured, and nothing is written."""

from __future__ import annotations

import json

import pytest

from eightfold.errors import OutputError
from eightfold.format.checkpoint import Checkpoint
from eightfold.quant import estimate
from eightfold.quant.budget import budget_for
from eightfold.quant.estimate import plan_run
from eightfold.quant.methods import AntiOutlier
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.probe import Machine, _take_turns
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model

RECIPES = {
    "w8a16": Recipe(QuantType.W8A16),
    "w8a16 with int8 head": Recipe(QuantType.W8A16, quantize_lm_head=True),
    "w8a8 m4 fa": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4, fa_quant=True),
    "dynamic kv": Recipe(QuantType.W8A8_DYNAMIC, kv_int8=True),
    "mix levels": Recipe(QuantType.W8A8_MIX, disable_level=3),
    "w8a16 fa m3": Recipe(QuantType.W8A16, anti_outlier=AntiOutlier.M3, fa_quant=True, fa_amp=1),
    "float32": Recipe(QuantType.W8A8_DYNAMIC, save_float32=True),
}


def machine(product: float = 1e-9, **changes: float) -> Machine:
    """Return a machine whose every figure is known."""
    kinds = (QuantType.FLOAT, QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX, QuantType.W8A16)
    figures = {
        "widen": 0.0,
        "widen_again": 0.0,
        "fresh": 0.0,
        "quantize": 1e-30,
        "survey_rest": 0.0,
        "calibrate_rest": 0.0,
        "read": 1e-30,
        "write": 1e-30,
        "copy": 1e-30,
        "gflops": 1.0,
        "busy": 1.0,
        "seconds": 1.0,
    }
    return Machine(product={(kind, k): product for kind in kinds for k in (48, 64, 80)}, **{**figures, **changes})


@pytest.fixture
def known(monkeypatch):
    """Make plan_run() believe in a machine with these figures."""

    def use(**changes: float) -> None:
        monkeypatch.setattr(estimate, "probe", lambda *words: machine(**changes))
        monkeypatch.setattr(estimate, "_process_seconds", lambda: 0.0)
        monkeypatch.setattr(estimate, "resident_bytes", lambda: 300 << 20)

    return use


def plan(source, recipe, lengths=(), **words):
    words = {"target": source.parent / "out", "memory": None, **words}
    return plan_run(Checkpoint.open(source), recipe, lengths, **words)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_probe_runs_for_every_recipe_and_leaves_nothing(tmp_path, architecture, recipe, monkeypatch):
    monkeypatch.setattr("eightfold.quant.probe._WRITE_BYTES", 4 << 20)
    monkeypatch.setattr("eightfold.quant.probe._FRESH_BYTES", 1 << 20)
    source = write_model(tmp_path / "float", tiny_config(architecture))
    found = plan(source, recipe, [len(sample) for sample in token_samples()])
    assert found.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("recipe", [RECIPES[name] for name in ("w8a16", "w8a8 m4 fa", "dynamic kv", "float32")])
def test_the_bytes_of_the_output_are_exact(float_model, known, recipe):
    known()
    samples = token_samples()
    found = plan(float_model, recipe, [len(sample) for sample in samples])
    outcome = quantize_checkpoint(float_model, float_model.parent / "made", recipe, samples)
    assert found.output_bytes == outcome.nbytes


def test_a_data_free_run_reads_every_byte_once(float_model, known):
    known(read=1.0)
    found = plan(float_model, RECIPES["w8a16"])
    stored = Checkpoint.open(float_model).tensors.values()
    norm = next(info.nbytes for info in stored if info.name == "model.norm.weight")
    assert found.seconds == sum(info.nbytes for info in stored) - norm


def test_products_are_counted_for_every_pass(float_model, known):
    known(product=1.0)
    found = {phase.name: phase.seconds for phase in plan(float_model, RECIPES["w8a8 m4 fa"], [3, 5]).phases}
    # q 64, k 32, v 32, o 48, gate 80, up 80, down 48 outputs, two layers
    outputs = 2 * (64 + 32 + 32 + 48 + 80 + 80 + 48)
    assert (found["survey"], found["calibrate"], found["prove"]) == (8 * outputs, 8 * outputs, 3 * outputs)


def test_the_disk_writes_while_other_work_goes_on(float_model, known):
    known(read=1.0, write=0.001, copy=0.5)
    found = plan(float_model, RECIPES["w8a16"])
    known(read=1.0, write=1000.0, copy=0.5)
    waits = plan(float_model, RECIPES["w8a16"])
    written = sum(phase.written_bytes for phase in found.phases)
    assert found.seconds == pytest.approx(sum(phase.read_bytes for phase in found.phases) + written / 2)
    assert waits.seconds == pytest.approx(1000 * written)


def test_a_busy_machine_is_slow_at_everything(monkeypatch):
    # Round 0 does not count. Of "a" the quickest is 1, of "b" 2; two rounds took 24 in all, where 2 * (1 + 2) would do.
    seconds = iter([50.0, 50.0, 1.0, 2.0, 19.0, 2.0])
    monkeypatch.setattr("eightfold.quant.probe._seconds", lambda work: next(seconds))
    monkeypatch.setattr("eightfold.quant.probe._MAX_ROUNDS", 3)
    assert _take_turns({"a": print, "b": print}) == ({"a": 2.0, "b": 4.0}, 2.0)


def test_samples_that_nothing_looks_at_cost_nothing(float_model, known):
    known(product=1.0)
    assert plan(float_model, RECIPES["w8a16"], [100]).seconds < 1e-9


def test_a_budget_that_hidden_states_do_not_fit_sends_them_to_files(float_model, known):
    known()
    lengths, recipe = [20] * 5_000, RECIPES["w8a8 m4 fa"]
    budget = budget_for(Checkpoint.open(float_model), recipe, [range(length) for length in lengths])
    roomy = plan(float_model, recipe, lengths, memory=1 << 40)
    tight = plan(float_model, recipe, lengths, memory=budget.needed + budget.states // 2)
    assert (roomy.spills, tight.spills) == (False, True)
    # 100,000 tokens in the float and the quantized stream, and one sample in the smoothed one
    assert roomy.peak_bytes - tight.peak_bytes == 4 * 48 * 200_020
    assert roomy.spilled_bytes == tight.spilled_bytes == 3 * 4 * 48 * 200_020


def test_what_does_not_fit_is_said(float_model, known, monkeypatch):
    known()
    found = plan(float_model, RECIPES["w8a16"], memory=1)
    assert not found.fits_memory
    assert found.refusal.startswith("--memory: got 0 MiB, expected at least ")
    assert "DOES NOT FIT" in "\n".join(found.render())
    monkeypatch.setattr(estimate, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    assert not plan(float_model, RECIPES["w8a16"]).fits_disk


def test_the_table_has_all_phases_and_their_sum(float_model, known):
    known(read=1.0, write=200.0)
    found = plan(float_model, RECIPES["w8a8 m4 fa"], [4, 5])
    lines = found.render()
    names = [line.split("  ")[0] for line in lines[1 : len(found.phases) + 1]]
    assert names == [
        "start",
        "embedding",
        "read layers",
        "survey",
        "quantize",
        "calibrate",
        "prove",
        "write layers",
        "hidden states",
        "head",
        "the disk",
    ]
    assert lines[len(found.phases) + 1].startswith("all ")
    assert found.as_json()["seconds"] == round(found.seconds, 2)


def test_a_place_that_cannot_be_written_is_refused(float_model, monkeypatch):
    def fail(**words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("eightfold.quant.probe.tempfile.TemporaryFile", fail)
    with pytest.raises(OutputError, match=r"^cannot write to .*: Permission denied. Choose a directory you may write"):
        plan(float_model, RECIPES["w8a16"])


def test_the_command_line_shows_it_and_writes_nothing(cli, float_model, known):
    known(read=1e-9, write=1e-9)
    out = float_model.parent / "out"
    shown = cli("quantize", float_model, out, "--scheme", "w8a16", "--plan")
    assert (shown.code, shown.out.splitlines()[0].split()) == (0, ["phase", "time", "read", "write", "peak", "memory"])
    document = cli("quantize", float_model, out, "--scheme", "w8a16", "--plan", "--json").json()
    assert document["fits_disk"] is True
    assert not out.exists()
