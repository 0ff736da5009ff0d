"""The version: from tags where the package is installed, and one fallback where it is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_what_is_not_installed_and_what_has_no_tags_have_one_version():
    (package,) = re.findall(r'^    __version__ = "(.+)"$', text("src/eightfold/__init__.py"), re.MULTILINE)
    (build,) = re.findall(r'^fallback_version = "(.+)"', text("pyproject.toml"), re.MULTILINE)
    assert package == build


def test_the_changelog_has_a_section_for_what_comes_next_and_links_for_all():
    sections = re.findall(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", section) for section in sections[1:])
    assert sections == re.findall(r"^\[(.+?)\]: ", text("CHANGELOG.md"), re.MULTILINE)
    headings = set(re.findall(r"^### (.+)", text("CHANGELOG.md"), re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
