"""What the tests of the output directory share."""

from __future__ import annotations

from pathlib import Path

from eightfold.format.writer import OutputDirectory


def make(target: Path, source: Path, marker: str = "new", *, overwrite: bool = False) -> None:
    """Make a directory that counts as a model and says who wrote it."""
    with OutputDirectory(target, source=source, overwrite=overwrite) as output:
        (output.path / "config.json").write_text(marker)


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}."))
