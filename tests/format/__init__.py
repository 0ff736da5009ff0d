"""What the tests of the output directory share."""

from __future__ import annotations

from pathlib import Path

from eightfold.format.journal import FORMAT
from eightfold.format.output import Output
from eightfold.format.shards import ShardedWriter

HEAD = {"format": FORMAT, "command": "synth"}


def output(target: Path, source: Path | None = None, *, overwrite: bool = False) -> Output:
    """Return a directory that is made without steps."""
    return Output(target, HEAD, source=source, overwrite=overwrite)


def make(target: Path, marker: str = "new", *, overwrite: bool = False) -> None:
    """Make a directory that counts as a model and says who wrote it."""
    with output(target, overwrite=overwrite) as made:
        ShardedWriter(made.path, "model", []).close()
        (made.path / "config.json").write_text(marker)
        made.finish({})


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}."))
