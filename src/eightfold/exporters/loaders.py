"""A directory of any writer, as MindIE or vllm-ascend reads it: repaired, written anew, and checked by their rules.

repair.py says what is written, repaired.py how the tensors of a linear follow from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eightfold import __version__
from eightfold.architectures import FAMILIES
from eightfold.check import Report, by_name, mindie, vllm_ascend
from eightfold.check.directory import RawDirectory
from eightfold.config import parse_config
from eightfold.errors import CheckpointError, ConfigError, EightfoldError, shortlist
from eightfold.exporters import ExportOptions
from eightfold.exporters.eight_bit import differences
from eightfold.exporters.repair import plan_repair
from eightfold.exporters.repaired import Repair, Stored, sound
from eightfold.exporters.repaired_experts import experts_settings
from eightfold.files import read_json, write_json
from eightfold.format.description import SHORT_NAME, render_description
from eightfold.format.directory import CONFIG_NAME, copy_files, list_sidecars, resolve_auto_map
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.named import NamedDirectory
from eightfold.format.output import Output
from eightfold.format.shards import total_bytes
from eightfold.format.source import hold_source, source_facts
from eightfold.format.streaming import Item, copy_companions, write_items
from eightfold.progress import Progress
from eightfold.scheme import weight_file_stem
from eightfold.written_config import both_dialects

CHECKS: Mapping[str, Callable[[RawDirectory], Report]] = {"mindie": mindie.check, "vllm-ascend": vllm_ascend.check}

_OURS = "quant_model_weight"
_GENERATION = "generation_config.json"
_OF_THE_PLACE = ("path", "owner", "permission")  # rules about where a directory lies, and not about what it holds
_SHOWN = 3  # places that a line names


@dataclass
class Repaired:
    """A directory that is going to be written for a loader; an Export."""

    d: RawDirectory
    to: str
    options: ExportOptions
    repair: Repair
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stored = Stored(self.d, self.repair.dtype)
        self.losses += _lines(self.repair.losses)
        self.notes += _lines(self.repair.repairs)
        self.config = parse_config(without_type(self.d.config), self.d.path / CONFIG_NAME)
        raw, _, _ = resolve_auto_map(self.d.config, self.d.path)
        written = self._config(raw)
        before = {key: value for key, value in self.d.config.items() if key != "model_type"}  # said elsewhere
        changed = [key for key in {**before, **written} if key != "model_type" and before.get(key) != written.get(key)]
        self.notes += _lines({"config.json says these anew": changed} if changed else {})
        if not self.notes and not self.losses:
            self.notes.append("nothing has to be repaired.")

    @property
    def items(self) -> list[Item]:
        """What is written, layer by layer."""
        where = self.d.path
        return [
            Item(each.planned, each.step, partial(sound, each.planned, each.pieces, where))
            for each in self.repair.tensors.values()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors to write."""
        return total_bytes(item.planned for item in self.items)

    def write(self, target: Path, *, overwrite: bool, progress: Progress) -> bool:
        """Write the directory, or go on where that was stopped; return whether it was there already.

        Raises:
            CheckpointError: the loader would still refuse it, or compute something wrong; nothing is left.
            OutputError: `target` cannot be made or replaced.
        """
        growing = Output(
            target, self._head(), source=self.d.path, explain=differences, overwrite=overwrite, progress=progress
        )
        with growing as output:
            if output.is_complete:
                return True
            hold_source(self.stored, output)
            stem = weight_file_stem(self.repair.kind)
            checksums = write_items(
                output, stem, self.items, title=f"for {self.to}", metadata={"format": "pt"}, progress=progress
            )
            self._write_companions(output)
            self._require_readable(output)
            output.finish(checksums)
        return False

    def _head(self) -> Entry:
        files_from = self.options.files_from
        return {
            "format": FORMAT,
            "command": "export",
            "eightfold": __version__,
            "to": self.to,
            "layers": self.d.model.num_layers,
            "options": {} if files_from is None else {"files_from": str(files_from)},
            "source": source_facts(self.stored),
        }

    def _write_companions(self, output: Output) -> None:
        if (other := self.options.files_from) is not None:
            copy_files(list_sidecars(other), other, output.path)
        raw, notes = copy_companions(self.stored, output)
        self.notes += notes
        if (found := output.path / _GENERATION).exists() and _is_damaged(found):
            found.unlink()
            if other is not None and (other / _GENERATION).exists():
                copy_files([other / _GENERATION], other, output.path)
            self.notes.append(f"{_GENERATION} is damaged, and is left out.")
        write_json(output.path / CONFIG_NAME, self._config(raw))
        tags = {name: each.tag for name, each in self.repair.tensors.items()}
        text = render_description(self.repair.kind, {**tags, **self.repair.bare})
        (output.path / SHORT_NAME).write_text(text, encoding="utf-8")

    def _config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json in both dialects, with what it says of experts."""
        written = both_dialects(without_type(raw), self.config, self.repair.dtype)
        return {**written, **experts_settings(self.d, self.repair.types, self.repair.kind)}

    def _require_readable(self, output: Output) -> None:
        if self.d.model.experts is None:
            report = CHECKS[self.to](RawDirectory.gather(output.path))
        else:
            report = by_name.check(NamedDirectory.gather(output.path), self.to)
        for finding in report.findings:
            rule = finding.rule.partition(".")[2]
            if not finding.verdict.is_harmless and rule not in _OF_THE_PLACE:
                raise CheckpointError(
                    f"a directory that {self.to} reads",
                    where=self.d.path,
                    got=f"one where it {finding.message.rstrip('.')} ({finding.place})",
                    expected="what can be repaired without the float model",
                    action="Nothing was written. Repair that first, or quantize the model again.",
                )


def plan_for(to: str, source: Path, options: ExportOptions) -> Repaired:
    """Return what is going to be written for one of CHECKS.

    Raises:
        EightfoldError: no model, a float one, or one of which something is missing that nothing else tells.
    """
    other = options.files_from
    if other is not None and not other.is_dir():
        raise ConfigError("files_from", got=other, expected="a directory, such as the float model")
    d = RawDirectory.open(source)
    ours = [name for name in d.files if name.startswith(_OURS) and name not in d.damaged]
    beside = [name for name in d.files if name not in ours] if ours else []
    repair = plan_repair(d.only(ours) if ours else d, to)
    if beside:
        repair.repair("files beside the weights are left out", *beside)
    if (said := d.config.get("model_type")) != (meant := FAMILIES[d.model.architecture].model_type):
        repair.repair(f"model_type is {meant}, as the architecture says, and was {said or 'none'}")
    return Repaired(d.only(ours) if ours else d, to, options, repair)


def without_type(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without a model_type: the architecture says it, and may be the only one that is right."""
    return {key: value for key, value in raw.items() if key != "model_type"}


def _is_damaged(path: Path) -> bool:
    try:
        read_json(path)
    except EightfoldError:
        return True
    return False


def _lines(found: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what is repaired or lost, a line each, with some of the places."""
    return [f"{what}: {shortlist(places, _SHOWN)}" if places else what for what, places in found.items()]
