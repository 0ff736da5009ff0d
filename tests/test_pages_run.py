"""Every code block of the README and of docs/start.md is run here on a tiny model, but for what NOT_HERE names."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import tiny_config, write_model

ROOT = Path(__file__).parent.parent
# Lines that need a network or half an hour, and what runs them instead.
NOT_HERE = {
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": "`make env`, with TORCH_FLAGS",
    "pip install '.[quantize,serve]'": "`make env`, which takes more extras",
    "make demo": "the last step of .ci/run",
}
PAGES = {"README.md": "Qwen3-0.6B", "docs/start.md": "FLOAT"}  # page -> what it calls the float model


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the code of each block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page, without comments."""
    lines = [line for language, code in blocks(page) if language == "bash" for line in code.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    """Return when a server answers."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, cli, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / PAGES[page], tiny_config(max_position_embeddings=1024, head_dim=32))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    port, server = free_port(), None
    try:
        for language, code in blocks(page):
            assert language in ("bash", "python"), code
            if language == "python":
                exec(compile(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), page, "exec"), {})
                continue
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                if shlex.join(words) in map(shlex.join, map(shlex.split, NOT_HERE)):
                    continue
                assert words[0] == "eightfold", line
                command = [sys.executable, "-m", *words]
                if words[1] == "serve":
                    words = [word for word in words if word not in ("--port", "8000")]
                    command = [sys.executable, "-m", *words, "--port", str(port)]
                    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
                    wait_for(port, server)
                elif words[1] == "chat":
                    done = subprocess.run(command, env=environment, input="Hello\n", capture_output=True, text=True)
                    assert done.returncode == 0, done.stderr
                else:
                    result = cli(*words[1:])
                    assert result.code == 0, (line, result.err)
    finally:
        if server is not None:
            server.send_signal(signal.SIGKILL)
            server.communicate()
    assert server is not None
    assert capsys.readouterr().out.strip() or "python" not in dict(blocks(page))  # the answers of Python


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_has_the_same_commands(page):
    chinese = page.replace(".md", ".zh.md")
    assert commands(chinese) == commands(page)
    python = [[code for language, code in blocks(one) if language == "python"] for one in (page, chinese)]
    assert python[0] == python[1]
    assert python[0] or page == "README.md"  # which leaves Python to the start page


def test_what_is_not_run_stands_on_a_page():
    known = [shlex.join(words) for page in PAGES for words in commands(page)]
    assert all(shlex.join(shlex.split(line)) in known for line in NOT_HERE)
