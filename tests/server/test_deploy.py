"""What stands in deploy/, beside the server that it deploys."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from eightfold.cli.main import command_type
from eightfold.cli.options import parse

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_dashboard_asks_only_for_metrics_that_the_server_has(serve):
    served = serve().http.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (eightfold_\w+) (\w+)", served, re.MULTILINE))
    known = {name + end for name, kind in kinds.items() for end in (["_bucket"] if kind == "histogram" else [""])}
    panels = json.loads((DEPLOY / "grafana/eightfold.json").read_text())["panels"]
    asked = [name for panel in panels for t in panel["targets"] for name in re.findall(r"eightfold_\w+", t["expr"])]
    assert len(set(asked)) > 10
    assert sorted(set(asked) - known) == []


def test_what_is_started_is_a_command(tmp_path):
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (docker,) = re.findall(r"^CMD (\[.+\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    (unit,) = re.findall(r"^ExecStart=\S+/eightfold (.+)$", (DEPLOY / "eightfold.service").read_text(), re.MULTILINE)
    for name, *words in (compose["eightfold"]["command"], json.loads(docker), unit.split()):
        assert parse(command_type(name), words, "eightfold") is not None


def test_every_file_that_compose_mounts_is_there():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    assert [name for name in mounts if name.startswith("./") and not (DEPLOY / name).is_file()] == []


def test_hadolint_has_nothing_to_say():
    if not (hadolint := shutil.which("hadolint")):
        pytest.skip("no hadolint")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
