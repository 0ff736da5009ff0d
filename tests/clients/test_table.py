"""The table of clients comes from a run of the scripts and versions that are here."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.clients.test_clients import RUNS, SCRIPTS

HERE = Path(__file__).parent
ROWS = json.loads((HERE.parents[1] / "benchmarks" / "results" / "clients.json").read_text())["rows"]


def test_every_script_has_its_rows():
    assert {path.name for path in SCRIPTS.glob("with_*")} == {run.split()[0] for runs in RUNS.values() for run in runs}
    assert {row["script"] for row in ROWS} == {run for runs in RUNS.values() for run in runs}


def test_the_versions_are_those_that_are_pinned():
    pinned = json.loads((HERE / "package.json").read_text())["dependencies"]
    versions = {f"{name} {version}" for name, version in pinned.items()}
    for path in (HERE / "requirements").glob("*.txt"):
        versions |= {f"{name} {version}" for name, version in re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.M)}
    assert {f"{row['package']} {row['version']}" for row in ROWS} <= versions


def test_the_locks_hold_what_is_asked_for():
    for path in (HERE / "requirements").glob("*.in"):
        wanted = set(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", path.read_text(), re.M))
        assert wanted and wanted <= set(re.findall(r"^([\w.-]+)==(\S+)", path.with_suffix(".txt").read_text(), re.M))
