"""A quantization that is killed and started again: the same bytes as an undisturbed one, and at most a layer lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from eightfold.errors import OutputError
from eightfold.format import output
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import JOURNAL_NAME, WORK_NAME, Journal, layers_done, partial_path, read_entries
from eightfold.format.output import Output
from eightfold.format.target import REPORT_NAME
from eightfold.quant import hidden
from eightfold.quant.budget import Budget
from eightfold.quant.hidden import GENERATIONS
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.quant.run import Run
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.quant.killing import Killed, killed_after
from tests.refusal import snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(4)
LAYERS = 3

RECIPES = {
    "w8a16": Recipe(QuantType.W8A16),
    "m4 fa": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4, fa_quant=True),
    "level fa-amp": Recipe(
        QuantType.W8A8, anti_outlier=AntiOutlier.M4, fa_quant=True, fa_amp=1, disable_level=2, quantize_lm_head=True
    ),
    "kv": Recipe(QuantType.W8A8, kv_int8=True, kv_observe=KVObserve.PRE_ROPE, disable_level=1),
    "mix": Recipe(QuantType.W8A8_MIX),
    "rotate": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.ROTATE, act_method=ActMethod.EXTREMES),
    "m4 kv anti": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4, kv_int8=True),
}


@pytest.fixture
def source(tmp_path):
    config = tiny_config("Qwen2ForCausalLM", num_hidden_layers=LAYERS)
    return write_model(tmp_path / "float", config, tokenizer=False)


def quantize(source, target, name="m4 fa", **options):
    anti = token_samples(3, seed=5) if name.endswith("anti") else None
    return quantize_checkpoint(source, target, RECIPES[name], SAMPLES, anti, **options)


def files(path):
    """Return every file and folder, with modes; the directory's own too."""
    return snapshot(path)


def operations(source, target, monkeypatch, name, **options):
    with killed_after(1_000_000, monkeypatch) as watch:
        quantize(source, target, name, **options)
    return watch.seen


# Strides that are prime, so that runs of unlike lengths are cut at unlike points; smaller ones take minutes.
@pytest.mark.parametrize(("name", "stride"), [("m4 fa", 37), ("level fa-amp", 97), ("w8a16", 43), ("m4 kv anti", 59)])
def test_a_run_killed_between_any_two_operations_on_files_goes_on(tmp_path, source, monkeypatch, name, stride):
    whole, out = tmp_path / "whole", tmp_path / "out"
    count = operations(source, whole, monkeypatch, name)
    expected = files(whole)
    assert count > 60
    for at in sorted({*range(0, count, stride), *range(count - 8, count)}):
        with killed_after(at, monkeypatch):
            quantize(source, out, name)
        done = layers_done(read_entries(partial_path(out)) or [])
        outcome = quantize(source, out, name)
        assert not outcome.restarted, at
        assert outcome.layers_resumed >= done, at
        assert files(out) == expected, at
        shutil.rmtree(out)
        assert not partial_path(out).exists(), at


def test_a_run_killed_again_and_again_gets_to_its_end(tmp_path, source, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize(source, whole)
    starts = 0
    while not (out / "config.json").exists():
        starts += 1
        with killed_after(120, monkeypatch):
            quantize(source, out)
        assert starts < 10
    quantize(source, out)
    assert starts > 2
    assert files(out) == files(whole)


@pytest.mark.parametrize("name", ["m4 fa", "w8a16"])
def test_an_old_model_stays_until_its_successor_is_complete(tmp_path, source, monkeypatch, name):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    quantize(source, old, "mix")
    quantize(source, new, name)
    shutil.copytree(old, out)
    count = operations(source, out, monkeypatch, name, overwrite=True)
    for at in sorted({*range(0, count, 59), *range(count - 16, count)}):
        shutil.rmtree(out)
        shutil.copytree(old, out)
        with killed_after(at, monkeypatch):
            quantize(source, out, name, overwrite=True)
        aside = partial_path(out) / WORK_NAME / "old"
        state = {name: entry for name, entry in files(out if out.exists() else aside).items() if WORK_NAME not in name}
        assert state in (files(old), files(new)), at
        quantize(source, out, name, overwrite=True)
        assert files(out) == files(new), at
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.")] == [], at


def test_starting_over_is_killed_at_any_moment(tmp_path, source, monkeypatch):
    new, out, begun = tmp_path / "new", tmp_path / "out", tmp_path / "begun"
    quantize(source, new, "w8a16")
    begin(source, begun, monkeypatch, name="mix")
    for at in range(0, 60, 3):
        shutil.copytree(partial_path(begun), partial_path(out))
        with killed_after(at, monkeypatch):
            quantize(source, out, "w8a16", overwrite=True)
        quantize(source, out, "w8a16", overwrite=True)
        assert files(out) == files(new), at
        shutil.rmtree(out)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_run_killed_beside_a_rename_leaves_the_old_model_or_a_way_back(tmp_path, source, monkeypatch, renames):
    """Killed before the first rename or between the two; what comes then is another command, or the same."""
    new, out, rename, done = tmp_path / "new", tmp_path / "out", Path.rename, []
    quantize(source, new, "w8a16")
    quantize(source, out, "mix")
    old = files(out)

    def killed(self, to):
        if len(done) == renames:
            raise Killed
        done.append(to)
        return rename(self, to)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "rename", killed)
        patched.setattr(Output, "__exit__", lambda self, *_: self._journal.close())
        patched.setattr(Path, "exists", lambda self: False)  # nothing is put back
        quantize(source, out, "w8a16", overwrite=True)
    assert out.exists() == (renames == 0)
    with pytest.raises(OutputError, match="got a model made otherwise"):
        quantize(source, out, "w8a16")
    assert files(out) == old
    assert quantize(source, out, "mix").already_complete
    assert quantize(source, out, "w8a16", overwrite=True).already_complete
    assert files(out) == files(new)
    assert not partial_path(out).exists()


def test_a_model_moved_away_is_not_lost_when_another_one_comes_meanwhile(tmp_path, source, monkeypatch):
    out, aside = tmp_path / "out", tmp_path / ".out.partial" / WORK_NAME / "old"
    begin(source, out, monkeypatch)
    quantize(source, tmp_path / "other", "mix")
    (tmp_path / "other").rename(aside)
    quantize(source, tmp_path / "other", "w8a16")
    (tmp_path / "other").rename(out)
    assert refusal(source, out, overwrite=True) == (
        f"output directory {out}: got a directory, and the one that was there before in {aside}, "
        "expected one of them. Move one of them elsewhere and run the same command again."
    )


def test_a_complete_successor_takes_an_empty_place_without_overwrite(tmp_path, source, monkeypatch):
    new, out = tmp_path / "new", tmp_path / "out"
    quantize(source, new, "w8a16")
    shutil.copytree(new, partial_path(out))
    assert quantize(source, out, "w8a16").already_complete
    assert files(out) == files(new)
    assert not partial_path(out).exists()


@pytest.mark.parametrize("name", RECIPES)
def test_hidden_states_in_files_give_the_same_bytes(tmp_path, source, monkeypatch, name):
    quantize(source, tmp_path / "memory", name)
    monkeypatch.setattr(Budget, "spills", lambda *_: True)
    quantize(source, tmp_path / "files", name)
    assert files(tmp_path / "memory") == files(tmp_path / "files")


def test_a_run_that_spills_goes_on_with_one_that_does_not(tmp_path, source, monkeypatch):
    quantize(source, tmp_path / "whole")
    begin(source, tmp_path / "out", monkeypatch)
    with monkeypatch.context() as spilling:
        spilling.setattr(Budget, "spills", lambda *_: True)
        assert quantize(source, tmp_path / "out").layers_resumed == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# --- started again


def begin(source, target, monkeypatch, layers=2, name="m4 fa", **options):
    """Leave a directory of which so many layers are finished."""
    append = Journal.append

    def kill(self, entry):
        append(self, entry)
        if entry.get("step") == f"layer {layers - 1}":
            with monkeypatch.context() as patched:
                patched.setattr(Journal, "close", lambda self: None)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, target, name, **options)
    assert layers_done(read_entries(partial_path(target))) == layers
    assert not target.exists()


def test_a_complete_directory_is_left_to_the_last_byte_and_time(tmp_path, source):
    out = tmp_path / "out"
    quantize(source, out)
    before = files(out), {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    for overwrite in (False, True):
        outcome = quantize(source, out, overwrite=overwrite)
        assert (outcome.already_complete, outcome.layers_resumed) == (True, LAYERS)
        assert (files(out), {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}) == before


def refusal(source, out, name="m4 fa", **options):
    before = files(out), files(partial_path(out))
    with pytest.raises(OutputError) as error:
        quantize(source, out, name, **options)
    assert (files(out), files(partial_path(out))) == before
    return str(error.value)


@pytest.mark.parametrize("is_complete", [True, False])
def test_another_recipe_is_refused_with_what_differs(tmp_path, source, monkeypatch, is_complete):
    out = tmp_path / "out"
    quantize(source, out) if is_complete else begin(source, out, monkeypatch)
    word = "made" if is_complete else "begun"
    assert refusal(source, out, "mix", part_bytes=9) == (
        f"output directory {out}: got a model {word} otherwise (`scheme`: w8a8 -> w8a8-mix; "
        "`anti_outlier`: m4 -> null; `fa_quant`: true -> false; `part_bytes`: null -> 9), "
        "expected the same recipe and source. Choose another directory, or start over with `overwrite`."
    )
    with pytest.raises(OutputError, match=r"\(calibration data: 4 samples of \d+ tokens \(.*\) -> 2 samples of"):
        quantize_checkpoint(source, out, RECIPES["m4 fa"], SAMPLES[:2])
    quantize(source, out, "mix", part_bytes=9, overwrite=True)
    quantize(source, tmp_path / "whole", "mix", part_bytes=9)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("change", ["a byte of the weights", "config.json", "a file more"])
def test_another_source_is_refused_with_the_file(tmp_path, source, monkeypatch, is_complete, change):
    out, name = tmp_path / "out", {"config.json": "config.json", "a file more": "vocab.json"}.get(change)
    quantize(source, out) if is_complete else begin(source, out, monkeypatch)
    if change == "a byte of the weights":
        name = "model.safetensors"
        blob = bytearray((source / name).read_bytes())
        blob[-1] ^= 1
        (source / name).write_bytes(blob)
    elif change == "config.json":
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**config, "rms_norm_eps": 2e-5}))
    else:
        (source / name).write_text("{}")
    what = "is new" if change == "a file more" else "has changed"
    assert f"(source: {name} {what}), expected the same recipe and source." in refusal(source, out)


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize(("text", "what"), [("", "is gone"), ("x = 2", "has changed")])
def test_modules_that_auto_map_names_are_part_of_the_source(tmp_path, source, monkeypatch, is_complete, text, what):
    out, module = tmp_path / "out", source / "configuration_own.py"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_own.Own"}}))
    module.write_text("x = 1")
    with monkeypatch.context() as patched, nullcontext() if is_complete else pytest.raises(KeyboardInterrupt):
        if not is_complete:
            patched.setattr(output, "_seal", interrupted)
        quantize(source, out)
    assert ((out if is_complete else partial_path(out)) / module.name).read_text() == "x = 1"
    module.write_text(text) if text else module.unlink()
    assert f"(source: configuration_own.py {what}), expected the same recipe and source." in refusal(source, out)
    quantize(source, out, overwrite=True)
    quantize(source, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert (out / module.name).exists() == module.exists()


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("changed", [".", "additional_chat_templates"])
def test_of_two_files_of_one_name_each_counts(tmp_path, source, monkeypatch, changed):
    (source / "additional_chat_templates").mkdir()
    for folder in (".", "additional_chat_templates"):
        (source / folder / "rag.jinja").write_text("old")
    begin(source, tmp_path / "out", monkeypatch)
    (source / changed / "rag.jinja").write_text("new")
    name = (Path(changed) / "rag.jinja").as_posix()
    assert f"(source: {name} has changed)" in refusal(source, tmp_path / "out")


def test_a_large_file_that_was_written_to_meanwhile_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr("eightfold.format.source.WHOLE_BYTES", 0)
    out = tmp_path / "out"
    begin(source, out, monkeypatch)
    (source / "model.safetensors").touch()
    assert "(source: model.safetensors changed since)" in refusal(source, out)
    assert quantize(source, out, overwrite=True).layers_resumed == 0


def test_a_source_elsewhere_is_the_same_source(tmp_path, source, monkeypatch):
    begin(source, tmp_path / "out", monkeypatch)
    source.rename(tmp_path / "moved")
    assert quantize(tmp_path / "moved", tmp_path / "out").layers_resumed == 2


def test_another_version_is_refused(tmp_path, source, monkeypatch):
    begin(source, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("eightfold.quant.identity.__version__", "99")
    assert "version of eightfold: " in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("what", ["weights", "states", "statistics", "no weights", "no work"])
def test_finished_work_that_is_damaged_is_made_anew(tmp_path, source, monkeypatch, what):
    out, name = tmp_path / "out", "kv"
    quantize(source, tmp_path / "whole", name)
    begin(source, out, monkeypatch, name=name)
    pattern = {"states": f"{WORK_NAME}/quantized-*", "statistics": f"{WORK_NAME}/statistics-00002"}.get(
        what, "*.safetensors"
    )
    grows = partial_path(out)
    path = sorted(grows.glob(pattern))[-1]  # of two generations the later one counts
    if what == "no weights":
        path.unlink()
    elif what == "no work":
        shutil.rmtree(grows / WORK_NAME)
    else:
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 8 if what == "weights" else -5] ^= 1
        path.write_bytes(blob)
    outcome = quantize(source, out, name)
    assert outcome.restarted
    assert outcome.layers_resumed == 0
    assert files(out) == files(tmp_path / "whole")


def test_starting_over_empties_the_work_folder_and_leaves_it_where_it_is(tmp_path, source, monkeypatch):
    out, resume = tmp_path / "out", Run.resume
    begin(source, out, monkeypatch)
    (partial_path(out) / WORK_NAME / "more").mkdir()
    folder = os.open(partial_path(out) / WORK_NAME, os.O_RDONLY)  # held, its number is nobody else's
    seen = []

    def look(self):
        seen.append(sorted(path.name for path in self._work.iterdir()))
        assert os.path.samestat(os.fstat(folder), self._work.stat())
        return len(seen) > 1 and resume(self)

    monkeypatch.setattr(Run, "resume", look)
    assert quantize(source, out).restarted
    os.close(folder)
    assert len(seen[0]) > 2
    assert seen[1:] == [["times.json"]]


def test_a_torn_last_line_counts_as_not_written(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    quantize(source, tmp_path / "whole")
    begin(source, out, monkeypatch, layers=1)
    with (partial_path(out) / JOURNAL_NAME).open("ab") as file:
        file.write(b'{"step": "layer 1", "lay')
    assert quantize(source, out).layers_resumed == 1
    assert files(out) == files(tmp_path / "whole")


def test_files_changed_since_completion_are_refused_and_replaced_with_overwrite(tmp_path, source):
    out = tmp_path / "out"
    quantize(source, out)
    expected = files(out)
    (out / "config.json").write_text("{}")
    (out / "quant_model_description.json").unlink()
    assert refusal(source, out) == (
        f"output directory {out}: got files changed since it was made (config.json, quant_model_description.json), "
        "expected them as they were. Choose another directory, or make it anew with `overwrite`."
    )
    assert not quantize(source, out, overwrite=True).already_complete
    assert files(out) == expected


def test_notes_of_the_user_in_a_complete_directory_do_not_matter(tmp_path, source):
    quantize(source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert quantize(source, tmp_path / "out").already_complete


def test_bad_input_leaves_nothing_of_what_was_begun(tmp_path, source, monkeypatch):
    begin(source, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("eightfold.quant.run.MAX_RELATIVE_DIFFERENCE", -1)
    with pytest.raises(Exception, match="largest change of a logit"):
        quantize(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_too_little_space_for_the_rest_keeps_what_is_finished(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    begin(source, out, monkeypatch)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(OutputError, match="disk space for"):
            quantize(source, out)
    assert quantize(source, out).layers_resumed == 2


def test_room_is_asked_for_only_where_there_is_no_file_yet(tmp_path, source, monkeypatch):
    out, asked, needed = tmp_path / "out", [], Run.spilled_bytes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Run, "spilled_bytes", property(lambda self: asked.append(needed(self)) or asked[-1]))
    begin(source, out, monkeypatch)
    states = sum(path.stat().st_size for path in (partial_path(out) / WORK_NAME).glob("*.f32"))
    whole = asked[-1]
    assert quantize(source, out).layers_resumed == 2
    assert 0 < states == whole - asked[-1]


def test_no_more_than_three_generations_of_hidden_states_are_on_disk(tmp_path, source, monkeypatch):
    seen = []
    append = Journal.append

    def look(self, entry):
        append(self, entry)
        seen.append({path.name for path in (tmp_path / ".out.partial" / WORK_NAME).glob("quantized-*")})

    monkeypatch.setattr(Journal, "append", look)
    quantize(source, tmp_path / "out")
    assert max(map(len, seen)) == len(set.union(*seen)) == GENERATIONS
    assert not (tmp_path / "out" / WORK_NAME).exists()


def test_a_layer_whose_hidden_states_do_not_reach_the_disk_is_not_finished(tmp_path, source, monkeypatch):
    def refuse(file):
        os.close(file)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hidden, "_sync_and_close", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        quantize(source, tmp_path / "out")
    assert layers_done(read_entries(tmp_path / "out") or []) == 0
    monkeypatch.undo()
    quantize(source, tmp_path / "out")
    assert layers_done(read_entries(tmp_path / "out")) == LAYERS


def test_a_directory_without_a_journal_loads_as_ever(tmp_path, source):
    quantize(source, tmp_path / "out")
    (tmp_path / "out" / JOURNAL_NAME).unlink()
    assert Checkpoint.open(tmp_path / "out").is_quantized
    quantize(source, tmp_path / "out", "mix", overwrite=True)  # the report says whose it is
    assert REPORT_NAME in {path.name for path in (tmp_path / "out").iterdir()}


def test_the_watch_kills():
    with pytest.raises(Killed):
        raise Killed


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *itertools.product(("hard link", "link"), (JOURNAL_NAME, "config.json", "weights.safetensors", "states")),
        ("link", "work"),  # directories have no hard links
    ],
)
def test_what_was_begun_is_not_written_through_a_link_to_a_file_of_the_user(tmp_path, source, monkeypatch, how, name):
    out, mine = tmp_path / "out", tmp_path / "mine"
    begin(source, out, monkeypatch)
    work = partial_path(out) / WORK_NAME
    path = {"states": next(work.glob("quantized-*")), "work": work}.get(name, partial_path(out) / name)
    if name == "work":
        mine.mkdir()
        (mine / "letter.txt").write_text("dear")
        shutil.rmtree(work)
    else:
        mine.write_bytes(path.read_bytes() if path.exists() else b"{}")
        path.unlink(missing_ok=True)
    if how == "link":
        path.symlink_to(mine)
    else:
        path.hardlink_to(mine)
    before = files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"which a run has begun: got a {how}, expected a file that has no other"):
            quantize(source, out, overwrite=overwrite)
        assert files(tmp_path) == before
