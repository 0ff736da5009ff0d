"""8-bit directory -> a GGUF file for llama.cpp, Ollama and OpenVINO GenAI, a few rows in memory at a time.

gguf_tensors.py says what becomes of weights, gguf_fields.py and gguf_vocabulary.py what the file says of the model. The
gguf package writes the head of the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold import __version__
from eightfold.exporters.eight_bit import ENDS, differences, step_of
from eightfold.exporters.gguf_fields import SIGNED, architecture_fields, lost_settings, require_architecture
from eightfold.exporters.gguf_tensors import Tensor, TensorPlan, plan_tensors
from eightfold.exporters.gguf_vocabulary import read_vocabulary
from eightfold.exporters.one_file import GrowingFile
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.gguf_layout import require_gguf
from eightfold.format.journal import FORMAT, Entry
from eightfold.format.source import hold_source, source_facts
from eightfold.hub.names import title_of
from eightfold.progress import Progress, by_bytes
from eightfold.scheme import NEEDS_CALIBRATION, QuantType
from eightfold.values import size_text

if TYPE_CHECKING:
    from eightfold.exporters import ExportOptions

COMMAND = "export --to gguf"

_METADATA = "metadata"  # the first step
_ALIGNMENT = 32  # of tensors in the file
_ROUNDING = 2**-8  # relative: that of the largest integer of a row, in which a scale of float16 is lost

# What `general.file_type` says of a file most of whose matrices have a type.
_FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "F32": "ALL_F32"}


@dataclass(frozen=True)
class GgufExport:
    """What is going to be written; see exporters.Export.

    Attributes:
        checkpoint: the directory.
        architecture: its name in the file.
        fields: metadata, by key.
        tensors: in the order of the file.
        options: those of the user that decide what is in it.
        losses: what the file will not have.
        notes: what a user should know.
    """

    checkpoint: Checkpoint
    architecture: str
    fields: dict[str, Any]
    tensors: Sequence[Tensor]
    options: Mapping[str, str]
    losses: Sequence[str]
    notes: Sequence[str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, target: Path, *, overwrite: bool, progress: Progress) -> bool:
        """Write the file, or go on where that was stopped; it appears when it is whole.

        Raises:
            OutputError: something is there that may not be replaced, or the disk is full.
            CheckpointError: a weight is damaged.
        """
        growing = GrowingFile(
            target,
            self._head(),
            self.nbytes,
            source=self.checkpoint.directory,
            explain=differences,
            overwrite=overwrite,
            is_ours=_is_ours,
        )
        steps = _steps(self.tensors)
        with growing as file:
            hold_source(self.checkpoint, file)
            done = file.take_over([_METADATA, *(name for name, _ in steps)], progress)
            if not done:
                self._write_metadata(file.path)
                file.include()
                file.close_step(_METADATA)
            with by_bytes(progress, "export to gguf", self.nbytes) as task:
                for i, (step, tensors) in enumerate(steps, 1):
                    for tensor in tensors:
                        if i >= done:
                            task.at(tensor.name)
                            self._write_tensor(file, tensor)
                        task.advance(tensor.nbytes)
                    if i >= done:
                        file.close_step(step)
            file.finish()
        return False

    def _head(self) -> Entry:
        return {
            "format": FORMAT,
            "command": "export",
            "eightfold": __version__,
            "to": "gguf",
            "layers": self.checkpoint.config.num_layers,
            # What the metadata says goes by the model's name and the version of the package that writes it.
            "options": {**self.options, "name": self.fields["general.name"], "gguf": version("gguf")},
            "source": source_facts(self.checkpoint),
        }

    def _write_tensor(self, file: GrowingFile, tensor: Tensor) -> None:
        file.pad(_ALIGNMENT)
        for piece in tensor.pieces():
            file.write(piece)
        if tensor.source:
            self.checkpoint.release([tensor.source])

    def _write_metadata(self, path: Path) -> None:
        import numpy as np

        gguf = require_gguf(COMMAND)
        writer = gguf.GGUFWriter(path, self.architecture)
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        for key, value in self.fields.items():
            adders.get(type(value), writer.add_array)(key, value)
        for tensor in self.tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()


def plan(source: Path, options: ExportOptions) -> GgufExport:
    """Return what an export to GGUF writes; see exporters.plan_export().

    Raises:
        UnsupportedError: a family, a setting, a tokenizer or a weight that GGUF or its readers do not have.
        DependencyError: the gguf package is not installed.
    """
    gguf = require_gguf(COMMAND)
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config
    architecture = require_architecture(config, source)
    vocabulary = read_vocabulary(source, checkpoint.config_raw, config.vocab_size)
    planned = plan_tensors(checkpoint, architecture, rounds_floats=options.floats == "q8_0")
    kinds = Counter(tensor.kind for tensor in planned.tensors if len(tensor.shape) > 1)
    fields = {
        "general.type": "model",
        "general.quantized_by": SIGNED,
        "general.name": title_of(source),
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPES[kinds.most_common(1)[0][0]]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **architecture_fields(config, architecture),
        **vocabulary.fields,
    }
    losses = [*_losses(checkpoint, planned), *lost_settings(config), *vocabulary.losses]
    notes = [*checkpoint.notes, *_notes(planned), *vocabulary.notes]
    chosen = {"floats": options.floats}
    return GgufExport(checkpoint, architecture, fields, planned.tensors, chosen, losses, notes)


def _steps(tensors: Sequence[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Return the tensors as steps of the journal, in the order of the file: what is small goes with what it follows."""
    found: list[tuple[str, list[Tensor]]] = []
    for tensor in tensors:
        name = step_of(tensor.source) if tensor.source else found[-1][0] if found else ENDS
        if not found or found[-1][0] != name:
            found.append((name, []))
        found[-1][1].append(tensor)
    return found


def _losses(checkpoint: Checkpoint, planned: TensorPlan) -> list[str]:
    """Return what of the weights and their parameters the file will not have."""
    losses = []
    if static := sum(planned.kinds[kind] for kind in NEEDS_CALIBRATION):
        losses.append(f"the input scales of {static} linears: llama.cpp rounds inputs by itself, in blocks of 32")
    attention = Counter(checkpoint.attention_type(i) for i in range(checkpoint.config.num_layers))
    for kind, what in ((QuantType.C8, "int8 keys and values"), (QuantType.FAQUANT, "int8 attention")):
        if attention[kind]:
            losses.append(f"{kind.value} in {attention[kind]} layers: {what} become float")
    if planned.asymmetric:
        losses.append(f"the integers of {len(planned.asymmetric)} weights with offsets, which are rounded anew")
    if planned.rounded:
        losses.append(f"the exact values of {_matrices(planned.rounded)}, rounded to Q8_0")
    small = {name: error for name, error in planned.scale_errors.items() if error > _ROUNDING}
    if small:
        worst = max(small, key=lambda name: small[name])
        got = f"off by up to {small[worst]:.1%} in {worst}"
        losses.append(f"scales of {len(small)} weights that are too small for float16 ({got})")
    return losses


def _notes(planned: TensorPlan) -> list[str]:
    """Return what a user should know of how the weights are stored and read."""
    notes = []
    if planned.scale_errors:
        worst = max(planned.scale_errors.values())
        notes.append(f"weights keep their integers; their scales become float16, off by at most {worst:.2g} of them.")
    if planned.kinds[QuantType.W8A8_DYNAMIC]:
        notes.append("llama.cpp rounds inputs in blocks of 32 channels, where W8A8_DYNAMIC has one scale a token.")
    if planned.kinds and planned.kept:
        nbytes = sum(tensor.nbytes for tensor in planned.tensors if tensor.source in planned.kept)
        notes.append(
            f"{_matrices(planned.kept)}, embedding and head among them, stay exact ({size_text(nbytes)}): "
            "--floats q8_0 makes that half as large, and answers faster."
        )
    return notes


def _matrices(names: Collection[str]) -> str:
    return f"{len(names)} float {'matrix' if len(names) == 1 else 'matrices'}"


def _is_ours(path: Path) -> bool:
    """Whether a file is one that this export has written: it says so near its beginning."""
    with path.open("rb") as file:
        begin = file.read(4096)
    return begin.startswith(b"GGUF") and SIGNED.encode() in begin
