"""`eightfold push`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.cli import console
from eightfold.cli.options import argument, as_json
from eightfold.errors import CheckpointError, ConfigError, InputError, OutputError, shortlist
from eightfold.files import read_text
from eightfold.hub.choice import HUBS
from eightfold.hub.names import HubId, parse_id
from eightfold.values import PATH, SWITCH, TEXT, choice, setting, size_text

_CARD = "README.md"
_MOST_BYTES = 1 << 20  # of a measurement


@dataclass(frozen=True, kw_only=True)
class PushCommand:
    """Publish an 8-bit model on Hugging Face or ModelScope, with a model card.

    Example: eightfold push Qwen3-0.6B-w8a8 my-org/Qwen3-0.6B-w8a8 --private

    First every file of OUT is compared with the checksums of its journal, so that only a whole model is published. The
    card says what OUT was made of and how, what `eightfold check` finds, how to run it, and what was measured; it is
    part of the upload and not of OUT. On Hugging Face all files appear together, in one commit. A command that was
    stopped may be run again: what the hub has is not sent again. The token comes from the environment: HF_TOKEN or
    MODELSCOPE_API_TOKEN.
    """

    source: Path = argument("OUT", "An 8-bit directory that quantize has finished. It is only read.")
    name: Path = argument("ORG/NAME", "The model on the hub. It is made if it is not there.")
    private: bool = setting(False, SWITCH, "Make a model that only you and your organization see.")
    revision: str | None = setting(
        None, TEXT, "Commit to this branch, which is made if it is not there.", metavar="BRANCH"
    )
    hub: str | None = setting(
        None, choice(*HUBS), "The hub. Default: that of EIGHTFOLD_HUB, else hf.", metavar="hf|modelscope"
    )
    base_model: str | None = setting(
        None,
        TEXT,
        "The float model's id, for the card. Default: the one that OUT was made of, if it came from a hub.",
        metavar="ORG/NAME",
    )
    measured: Path | None = setting(
        None, PATH, "What `eval --json` has printed, a document on each line, for the card.", metavar="FILE"
    )
    save_card: Path | None = setting(None, PATH, "Write the card to this file too.", metavar="FILE")
    dry_run: bool = setting(False, SWITCH, "Show the card and the files, and send nothing.")
    as_json: bool = as_json()

    def execute(self) -> None:
        model = self._model
        from eightfold.report.card import read_made, render_card

        made = read_made(self.source)
        self._require_whole()
        card = render_card(
            made, model.name, base=self.base_model or "", readers=self._readers(), measured=self._measurements()
        )
        if self.save_card is not None:
            self.save_card.write_text(card, encoding="utf-8")
        # The journal does not list itself.
        names = sorted({*made.files, *self._unlisted()} - {_CARD})
        files: dict[str, Path | bytes] = {_CARD: card.encode(), **{name: self.source / name for name in names}}
        nbytes = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
        address = "" if self.dry_run else self._publish(model, files)
        if self.as_json:
            console.print_json(
                {"model": model.name, "files": list(files), "nbytes": nbytes, "address": address or None}
            )
            return
        if self.dry_run:
            print(card)
            print("\n".join(f"would send {name}" for name in files))
        print(f"{model}: {len(files)} files, {size_text(nbytes)}{f', {address}' if address else ', nothing was sent'}")

    @property
    def _model(self) -> HubId:
        found = parse_id(str(self.name))
        if found.revision and self.revision:
            raise ConfigError("revision", got=f"{self.revision} and {found.revision}", expected="one branch")
        return HubId(found.name, self.revision or found.revision)

    def _unlisted(self) -> list[str]:
        from eightfold.format.journal import JOURNAL_NAME

        return [JOURNAL_NAME]

    def _require_whole(self) -> None:
        from eightfold.format.output import verify_files

        if changed := verify_files(self.source, console.bars):
            raise CheckpointError(
                "files",
                where=self.source,
                got=f"others than when it was made ({shortlist(changed)})",
                expected="a whole model",
                action="Make it again with eightfold quantize.",
            )

    def _readers(self) -> dict[str, str]:
        """Return what each loader would make of OUT, in a few words."""
        from eightfold.cli.inspecting import CheckCommand

        found = {}
        for report in CheckCommand(model=self.source).reports():
            worst = [each.message for each in report.findings if each.verdict == report.verdict]
            found[report.loader] = f"{report.verdict.value}: {worst[0]}" if worst else "loads all of it"
        return found

    def _measurements(self) -> list[dict[str, Any]]:
        if self.measured is None:
            return []
        found = []
        for line in filter(str.strip, read_text(self.measured, "measurement", _MOST_BYTES)[0].splitlines()):
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict) or not isinstance(document.get("ppl"), (int, float)):
                expected, action = (
                    "what `eval --json` prints",
                    "Write it anew: eightfold eval OUT --against FLOAT_DIR --json > FILE",
                )
                raise InputError("measurement", where=self.measured, got=line, expected=expected, action=action)
            found.append(document)
        return found

    def _publish(self, model: HubId, files: dict[str, Path | bytes]) -> str:
        from eightfold.hub.choice import chosen_hub
        from eightfold.hub.clients import NotReached

        hub, message = chosen_hub(self.hub), f"Publish {self.source.resolve().name} with eightfold"
        try:
            return hub.publish(model, files, private=self.private, message=message)
        except NotReached as error:
            raise OutputError(
                f"model {model} on {hub.title}",
                got=f"no answer of the hub ({error})",
                expected="one",
                action="Check the network and run the same command again: what the hub has is not sent again.",
            ) from None
