"""`python -m eightfold.msmodelslim quant`; see the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from eightfold.cli import console, options
from eightfold.cli.main import EXIT_USER
from eightfold.cli.main import main as eightfold
from eightfold.errors import ConfigError, EightfoldError, UnsupportedError, clipped
from eightfold.hub.names import id_of
from eightfold.msmodelslim.known import ALL_TYPES, known_practice
from eightfold.msmodelslim.practice import Practice, read_practice
from eightfold.progress import filtered
from eightfold.values import PATH, SWITCH, TEXT, choice, setting

PROGRAM = "msmodelslim"
_ELSEWHERE = {
    "analyze": "Run: eightfold analyze FLOAT_DIR --scheme w8a8",
    "tune": "Run: eightfold quantize FLOAT_DIR OUT --max-kl X",
}
_TAGS = "--tag"


@dataclass(frozen=True, kw_only=True)
class QuantCommand:
    """Quantize a float model as `msmodelslim quant` of Huawei's documents does, by `eightfold quantize`.

    Example: msmodelslim quant --model_path Qwen2.5-7B-Instruct --save_path OUT --device npu
    --model_type Qwen2.5-7B-Instruct --quant_type w8a8 --trust_remote_code True

    The settings are those that msModelSlim 26.1.0 recommends for the model type, or for any model where it has none:
    w8a8 is then int8 activations scaled by token, smoothed by iter_smooth. Of a practice file (--config_path) the
    processors iter_smooth, flex_smooth_quant, linear_quant, dynamic_cache and fa3_quant are done, and all else is
    refused by its name. The command in the words of eightfold is printed before the work. `eightfold quantize` without
    these settings is more accurate (docs/accuracy.md).
    """

    model_path: str = setting(
        MISSING, TEXT, "The float model, or the ORG/NAME[@REVISION] of a hub.", flag="--model_path", metavar="DIR"
    )
    save_path: str = setting(MISSING, TEXT, "The directory to make.", flag="--save_path", metavar="DIR")
    model_type: str | None = setting(
        None,
        TEXT,
        "Model whose settings are taken, such as Qwen2.5-7B-Instruct. Default: the name of --model_path.",
        flag="--model_type",
        metavar="NAME",
    )
    quant_type: str | None = setting(
        None,
        choice(*ALL_TYPES),
        "w8a8, w8a16, w8a8c8 (with an int8 cache); the others are refused with the reason. Default: w8a8.",
        flag="--quant_type",
        metavar="TYPE",
    )
    config_path: Path | None = setting(
        None, PATH, "A practice file; --quant_type is then ignored.", flag="--config_path", metavar="FILE"
    )
    device: str = setting(
        "npu",
        TEXT,
        "What computes: npu, npu:0,1 or cpu. Without torch_npu, npu is the CPU.",
        metavar="DEVICE",
    )
    calib: Path | None = setting(
        None,
        PATH,
        "Calibration texts, as eightfold quantize takes them; msModelSlim has no such option. Default: the practice's "
        "dataset if it is a file, else 64 mixed texts.",
        metavar="FILE",
    )
    trust_remote_code: str = setting(
        "False",
        choice("True", "False"),
        "No effect: nothing in a model is executed.",
        flag="--trust_remote_code",
        metavar="BOOL",
    )
    tag: str | None = setting(
        None, TEXT, "Scenarios, as many words as are given. No effect.", flag=_TAGS, metavar="TAG..."
    )
    debug: bool = setting(False, SWITCH, "No effect.")

    def execute(self) -> int:
        device = self._device
        practice, notes = self._practice()
        for text in notes:
            console.note(text)
        with TemporaryDirectory() as folder:
            words = ["quantize", self.model_path, self.save_path, *practice.words(), "--device", device]
            words += self._calibration(practice)
            if practice.modules:
                recipe = Path(folder) / "recipe.yaml"
                lines = [f'  "{pattern}": {scheme}' for pattern, scheme in practice.modules.items()]
                recipe.write_text("\n".join(["modules:", *lines, ""]))
                words += ["--recipe", str(recipe)]
                console.note(f"modules: {', '.join(f'{name}: {kind}' for name, kind in practice.modules.items())}")
            console.note(f"eightfold {' '.join(words)}")
            sys.argv = ["eightfold", *words]
            return eightfold()

    def _practice(self) -> tuple[Practice, Iterator[str]]:
        if self.config_path is not None:
            practice = read_practice(self.config_path)
            return practice, self._notes(practice, "")
        name = self.model_type or self._name
        practice, is_own = known_practice(name, self.quant_type or "w8a8")
        told = "" if is_own else f"msModelSlim has no settings of its own for {name}: those for any model are taken."
        return practice, self._notes(practice, told)

    @property
    def _name(self) -> str:
        model = id_of(Path(self.model_path))
        return model.name.rpartition("/")[2] if model else Path(self.model_path).resolve().name

    def _notes(self, practice: Practice, about_practice: str) -> Iterator[str]:
        if about_practice:
            yield about_practice
        if self.trust_remote_code == "True":
            yield "--trust_remote_code changes nothing: nothing in a model is executed."
        if ":" in self.device:
            yield f"--device {self.device}: one device is used; torchrun shares the work between processes."
        if practice.dataset and self._dataset(practice) is None:
            yield f"the practice's dataset {practice.dataset} is not here: eightfold's own texts, or --calib, are used."

    def _dataset(self, practice: Practice) -> Path | None:
        """Return the practice's texts, if they are a file beside it or where its name says."""
        if self.calib is not None or not practice.dataset:
            return self.calib
        beside = self.config_path.parent if self.config_path else Path()
        return next((path for path in (Path(practice.dataset), beside / practice.dataset) if path.is_file()), None)

    @property
    def _device(self) -> str:
        device, _, numbers = self.device.partition(":")
        if device not in ("npu", "cpu") or not all(part.isdigit() for part in numbers.split(",") if numbers):
            raise ConfigError("--device", got=self.device, expected="npu, npu:0,1 or cpu")
        return device

    def _calibration(self, practice: Practice) -> list[str]:
        texts = self._dataset(practice)
        return ["--calib", str(texts)] if texts else []


def _with_tags_in_one(words: Sequence[str]) -> list[str]:
    """Return the words with all that follows --tag as one value."""
    if _TAGS not in words:
        return list(words)
    begin = words.index(_TAGS) + 1
    end = next((place for place in range(begin, len(words)) if words[place].startswith("-")), len(words))
    return [*words[:begin], " ".join(words[begin:end]), *words[end:]]


def run(words: Sequence[str]) -> int:
    """Do what a command line says; return the exit code.

    Raises:
        EightfoldError: it cannot be done.
    """
    command = words[0] if words else ""
    if command in ("", *options.HELP):
        print(options.help_text(QuantCommand, f"{PROGRAM} quant"))
        return 0 if command else EXIT_USER
    if command in _ELSEWHERE:
        raise UnsupportedError(f"{PROGRAM} {command}", expected="quant", action=_ELSEWHERE[command])
    if command != "quant":
        raise ConfigError("command", got=command, expected="quant")
    found = options.parse(QuantCommand, _with_tags_in_one(words[1:]), f"{PROGRAM} quant")
    if found is None:
        print(options.help_text(QuantCommand, f"{PROGRAM} quant"))
        return 0
    return found.execute()


def main() -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on stderr."""
    with filtered(keeps_stdout=False):
        try:
            return run(sys.argv[1:])
        except (EightfoldError, OSError) as error:
            print(f"{PROGRAM}: {clipped(str(error))}", file=sys.stderr)
            return EXIT_USER
        except KeyboardInterrupt:
            return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
