"""What surrounds answers: keys, ids, limits, faults, clients that leave, the end; with an engine that does as told."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest

from eightfold.errors import CapacityError
from eightfold.server.fields import ApiError
from tests.server.running import Running, eventually


def error_of(raw):
    return raw.json()["error"]


def in_background(call):
    """Start a call in a thread; return how to get its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def result():
        thread.join(20)
        return found[0]

    return result


# ---- Keys, ids, origins.


def test_without_the_key_only_health_and_the_page_are_open(serve):
    running = serve({"api_keys": ("sesame",)})
    assert [running.http.get(path).status_code for path in ("/health", "/")] == [200, 200]
    for given in ("Bearer sesam", "Bearer sesame2", "sesame", "Basic sesame", "Bearer", "Bearer s\u00e9same", None):
        headers = {} if given is None else {"authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/version", "/nowhere"):
            raw = running.http.get(path, headers=headers)
            assert (raw.status_code, raw.headers["www-authenticate"]) == (401, "Bearer")
            assert (error_of(raw)["type"], error_of(raw)["code"]) == ("authentication_error", "invalid_api_key")
    assert running.http.get("/v1/models", headers={"authorization": "bearer  sesame"}).status_code == 200
    assert running.http.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
    assert running.http.get("/v1/models", headers={"x-api-key": "Bearer sesame"}).status_code == 401
    with running.openai("sesame") as client:
        assert client.models.list().data[0].id == "tiny"
    with running.openai("wrong") as client, pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
        client.models.list()


def test_any_of_several_keys_is_accepted_in_either_header(serve):
    running = serve({"api_keys": ("one", "two")})
    for headers, status in (
        ({"authorization": "Bearer one"}, 200),
        ({"authorization": "Bearer two"}, 200),
        ({"x-api-key": "two"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": "two"}, 200),  # a proxy's own, and the client's
        ({"authorization": "Basic dHdv", "x-api-key": "two"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": "wrong"}, 401),
        ({"authorization": "Bearer one,two"}, 401),
        ({"x-api-key": ""}, 401),
    ):
        raw = running.http.get("/v1/models", headers=headers)
        assert raw.status_code == status, headers
        assert running.http.get("/health", headers=headers).status_code == 200


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    import hmac

    from eightfold.server import keys

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(other) or one == other)
    known = keys.Keys(("a", "b", "c"))
    names = [known.client({b"x-api-key": key}) for key in "abc"]
    assert (len(set(names)), len(compared)) == (3, 9)
    assert known.client({b"authorization": "Bearer a"}) == names[0]


def test_a_sane_request_id_comes_back_and_others_are_replaced(serve):
    running = serve()
    for given, kept in (("abc-1.2_3:4", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)):
        found = running.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given, found.startswith("req_")) == (kept, not kept)
    assert running.http.get("/nowhere").headers["x-request-id"].startswith("req_")


def test_pages_of_allowed_origins_may_call(serve):
    running = serve({"cors_origins": ("https://ours.example",), "api_keys": ("k",)})
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    ours = running.http.options("/v1/chat/completions", headers={"origin": "https://ours.example", **asks})
    assert (ours.status_code, ours.headers["access-control-allow-origin"]) == (200, "https://ours.example")
    other = running.http.options("/v1/chat/completions", headers={"origin": "https://other.example", **asks})
    assert "access-control-allow-origin" not in other.headers
    raw = running.http.get("/v1/models", headers={"origin": "https://ours.example"})
    assert (raw.status_code, raw.headers["access-control-allow-origin"]) == (401, "https://ours.example")
    assert raw.headers["access-control-expose-headers"] == "X-Request-Id, Retry-After"


def test_without_the_option_no_origin_is_allowed(serve):
    raw = serve().http.get("/health", headers={"origin": "https://other.example"})
    assert not [name for name in raw.headers if name.startswith("access-control")]


# ---- By which name the server is called.


def call(running, *headers, version="1.1", path="/v1/models"):
    """Send a GET with just these headers; return the status and the error's code."""
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10) as connection:
        lines = [f"GET {path} HTTP/{version}", *headers, "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body).get("error", {}).get("code")


@pytest.mark.parametrize("path", ["/v1/models", "/", "/health", "/nowhere"])
def test_a_foreign_name_is_refused_on_every_path(serve, path):
    assert call(serve(), "Host: evil.example", path=path) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:8000",
        "[::1]:80",
        "127.0.0.2:8000",
        "[::ffff:127.0.0.1]",
        "ours.example:99",
        "10.1.2.3",
    ],
)
def test_names_of_the_server_and_those_allowed_are_answered(serve, host):
    running = serve({"allowed_hosts": ("Ours.example.:8000", "10.1.2.3")})
    assert call(running, f"Host: {host}") == (200, None)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], (400, "invalid_request")),
        (["Host: localhost", "Host: localhost"], (400, "invalid_request")),
        (["Host:"], (400, "invalid_host")),
        (["Host: localhost@evil.example"], (400, "invalid_host")),
        (["Host: localhost, evil.example"], (400, "invalid_host")),
        (["Host: localhost:http"], (400, "invalid_host")),
        (["Host: [::1"], (400, "invalid_host")),
        (["Host: l\xf6calhost"], (400, "invalid_host")),
        (["Host: localhost.evil.example"], (403, "host_not_allowed")),
        (["Host: evil.localhost"], (403, "host_not_allowed")),
        (["Host: 0.0.0.0"], (403, "host_not_allowed")),
        (["Host: [::]"], (403, "host_not_allowed")),
        (["Host: 127.1"], (403, "host_not_allowed")),
        (["Host: 2130706433"], (403, "host_not_allowed")),
        (["Host: localhost", "Origin: http://evil.example"], (403, "origin_not_allowed")),
        (["Host: localhost", "Origin: null"], (403, "origin_not_allowed")),
        (["Host: localhost", "Origin: http://localhost.evil.example:8000"], (403, "origin_not_allowed")),
        (["Host: localhost", "Origin: http://localhost:3000"], (200, None)),
    ],
)
def test_missing_doubled_and_strange_names(serve, headers, expected):
    assert call(serve(), *headers) == expected


def test_http_1_0_without_a_name_is_refused_too(serve):
    assert call(serve(), version="1.0") == (400, "invalid_host")


def test_with_a_key_names_are_checked_only_against_a_list(serve):
    key = "Authorization: Bearer k"
    assert call(serve({"api_keys": ("k",)}), "Host: any.example", key) == (200, None)
    listed = serve({"api_keys": ("k",), "allowed_hosts": ("ours.example",)})
    assert call(listed, "Host: any.example", key) == (403, "host_not_allowed")
    assert call(listed, "Host: ours.example", key) == (200, None)


def test_on_another_address_names_are_checked_only_against_a_list():
    from eightfold.server.service import Hosts, ServerSettings

    Hosts("0.0.0.0", ServerSettings(model_names=("m",))).require([(b"host", b"any.example")])
    Hosts("fe80::1%eth0", ServerSettings(model_names=("m",))).require([(b"host", b"any.example")])
    with pytest.raises(ApiError, match="Host: got"):
        hosts = Hosts("0.0.0.0", ServerSettings(model_names=("m",), allowed_hosts=("ours.example",)))
        hosts.require([(b"host", b"any.example")])


def test_any_name_may_be_allowed(serve):
    assert call(serve({"allowed_hosts": ("*",)}), "Host: any.example", "Origin: null") == (200, None)


def test_origins_of_allowed_pages_pass(serve):
    running = serve({"cors_origins": ("https://ours.example",)})
    assert call(running, "Host: localhost", "Origin: https://ours.example") == (200, None)
    assert call(running, "Host: localhost", "Origin: http://ours.example") == (403, "origin_not_allowed")


# ---- Connections that are silent, slow or too many.


def connect(running):
    return socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10)


def read_all(connection):
    answer = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: local",
        # A whole request first, and its unread body; then the head of the next.
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx",
    ],
)
def test_who_does_not_finish_a_head_is_sent_away(serve, monkeypatch, sent):
    monkeypatch.setattr("eightfold.server.connections.HEAD_SECONDS", 0.2)
    with connect(serve()) as connection:
        connection.sendall(sent)
        if sent.endswith(b"x"):
            time.sleep(0.2)
            connection.sendall(b"x")
        last = read_all(connection).rpartition(b"HTTP/1.1 ")[2]
    assert last.startswith(b"408 ")
    assert json.loads(last.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_trickle_of_a_head_does_not_begin_its_time_anew(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.connections.HEAD_SECONDS", 0.5)
    begin = time.monotonic()
    with connect(serve()) as connection, suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        while time.monotonic() - begin < 10:
            connection.sendall(b"a: b\r\n")
            time.sleep(0.05)
    assert time.monotonic() - begin < 5


def test_silent_connections_make_room_for_those_that_ask(serve, caplog):
    running = serve({})
    running.server._connections.most = 4
    silent = [connect(running) for _ in range(20)]
    assert eventually(lambda: len(running.server.server_state.connections) <= 4)
    for _ in range(3):
        with connect(running) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    for each in silent:
        each.close()
    running.server._connections.tell()
    lines = [record.getMessage() for record in caplog.records if "closed connections" in record.getMessage()]
    assert len(lines) == 1 and " x too many" in lines[0]


def test_of_descriptors_that_run_out_the_log_tells_once(serve, caplog):
    running = serve({})
    connections, loop = running.server._connections, running.server.servers[0].get_loop()
    context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
    for _ in range(1000):
        loop.call_soon_threadsafe(connections.on_fault, loop, context)
    loop.call_soon_threadsafe(connections.on_fault, loop, {"message": "other", "exception": RuntimeError("x")})
    loop.call_soon_threadsafe(connections.tell)
    assert eventually(lambda: len(caplog.records) >= 2)
    fault, told = (record.getMessage() for record in caplog.records[-2:])
    assert (fault, told) == ("event loop: other", "closed connections: 1000 x not accepted (Too many open files)")


def test_the_limit_of_descriptors_is_raised_and_connections_stay_below_half_of_it():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))\n"
        "from eightfold.server.connections import Connections; made = Connections()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE), made.most, made.backlog)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["512", "512", "256", "32"], found.stderr


def test_answers_that_go_on_are_not_given_up_for_new_connections(serve):
    running = serve({}, stuck=True)
    found = in_background(lambda: running.chat())
    assert eventually(lambda: running.engine.open)
    running.server._connections.most = 1
    with connect(running) as connection:
        assert read_all(connection) == b""
    running.engine.stuck = False
    assert found().status_code == 200


def test_who_does_not_read_an_answer_ends_it(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.connections.STALL_SECONDS", 0.5)
    running = serve({}, answer="word " * 10_000, max_model_len=60_000)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 50_000, "logprobs": 2}).encode()
    with connect(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: running.engine.open)
        assert eventually(lambda: not running.engine.open, 20)
    assert eventually(lambda: not running.server.service.limiter.inside)
    assert set(running.engine.ended) <= {"aborted", "closed"}


def test_what_is_no_http_gets_an_error_of_the_usual_form(serve):
    for raw in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 5000):
        with connect(serve()) as connection:
            connection.sendall(raw)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert error_of_bytes(answer)["code"] == "invalid_request"


def error_of_bytes(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


# ---- Faults of the engine.


def test_what_the_engine_refuses_is_a_400(serve):
    running = serve(refusal=CapacityError("prompt", got="too much"))
    for stream in (False, True):
        raw = running.chat(stream=stream)
        assert (raw.status_code, error_of(raw)["message"]) == (400, "prompt: got too much")


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_before_the_answer_is_a_500_that_tells_nothing(serve, stream, caplog):
    raw = serve(fails_after=0).chat("a secret", stream=stream)
    assert (raw.status_code, error_of(raw)["code"]) == (500, "internal_error")
    assert "secret" not in raw.text
    assert any(record.exc_info for record in caplog.records)


def test_a_fault_within_a_stream_is_its_last_event(serve):
    running = serve(answer="Hello there", fails_after=5)
    events = running.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Hello"
    assert events[-1]["error"]["code"] == "internal_error"
    with running.openai() as client, pytest.raises(openai.APIError, match="internal error"):
        list(client.completions.create(model="tiny", prompt="x", stream=True))


def test_a_fault_of_one_prompt_ends_the_others(serve):
    running = serve(answer="Hello there", fails_after=5)
    assert running.post("/v1/completions", {"prompt": ["a", "b", "c"]}).status_code == 500
    assert eventually(lambda: not running.engine.open)


def test_a_crashed_engine_is_503_and_so_is_health(serve):
    from eightfold.engine.async_llm import EngineStoppedError

    running = serve(refusal=EngineStoppedError("the engine crashed: a secret"), is_healthy=False)
    raw = running.chat()
    assert (raw.status_code, error_of(raw)["code"], "secret" in raw.text) == (503, "engine_stopped", False)
    health = running.http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})


# ---- Clients that leave.


def half_a_request(running, content, reads=b""):
    """Send a request on a connection of its own, wait for some bytes of the answer, and leave."""
    body = json.dumps(content).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while reads not in received:
            received += connection.recv(65536)
        if not reads:
            assert eventually(lambda: running.engine.open)


@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
def test_who_leaves_a_stream_ends_it(serve, prompt):
    running = serve({}, answer="word " * 50, seconds=0.01)
    half_a_request(running, {"prompt": prompt, "stream": True, "max_tokens": 200}, reads=b"data: ")
    assert eventually(lambda: not running.engine.open)
    assert set(running.engine.ended) == {"aborted"}
    assert eventually(lambda: running.server.service.limiter.inside == 0)
    assert running.metric("answers_finished_total", reason="abort") == len(prompt)


def test_who_leaves_while_waiting_ends_it(serve, caplog):
    running = serve(stuck=True)
    with caplog.at_level("INFO", "eightfold.server"):
        half_a_request(running, {"prompt": "x"})
        assert eventually(lambda: not running.engine.open)
        assert eventually(lambda: [r.record.status for r in caplog.records if hasattr(r, "record")] == [499])
    assert running.engine.ended == {"aborted": 1}


@contextmanager
def half_closed(running, content, *, version="1.1", path="/v1/completions", waits=False):
    """Send a request on a connection of its own and close the sending side, after the engine has it if it waits."""
    body = json.dumps(content).encode()
    with connect(running) as connection:
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert not waits or eventually(lambda: running.engine.open)
        connection.shutdown(socket.SHUT_WR)
        yield connection


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("content", [{"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": 5}])
def test_who_closes_only_its_sending_side_is_answered(serve, version, content):
    with half_closed(serve(), content, version=version) as connection:
        head, _, body = read_all(connection).partition(b"\r\n\r\n")  # and the connection was closed
    assert head.startswith(b"HTTP/1.1 400 " if content["prompt"] == 5 else b"HTTP/1.1 200 ")
    assert b'"error"' in body if content["prompt"] == 5 else b'"finish_reason":"stop"' in body


def test_requests_before_the_end_of_what_is_sent_are_all_answered(serve):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(serve()) as connection:
        connection.sendall(3 * head)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).count(b'{"status":"ok"}') == 3


def test_who_waits_longer_with_its_sending_side_closed_is_asked_to_go_on_waiting(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.connections.PROBE_SECONDS", 0.0)
    running = serve(stuck=True)
    with half_closed(running, {"prompt": "x"}) as connection:
        begin = connection.recv(100)
        assert begin == b"HTTP/1.1 100 Continue\r\n\r\n"
        running.engine.stuck = False
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert running.engine.ended == {"finished": 1}


@pytest.mark.parametrize(("version", "seconds"), [("1.1", "PROBE_SECONDS"), ("1.0", "SILENT_SECONDS")])
def test_who_closes_its_sending_side_and_then_leaves_ends_its_request(serve, monkeypatch, version, seconds):
    monkeypatch.setattr(f"eightfold.server.connections.{seconds}", 0.0)
    running = serve(stuck=True)
    with half_closed(running, {"prompt": "x"}, version=version, waits=True):
        pass
    assert eventually(lambda: not running.engine.open)
    assert running.engine.ended == {"aborted": 1}


def test_a_body_that_ends_early_is_no_request(serve, caplog):
    caplog.set_level("INFO", "eightfold.server")
    running = serve()
    with connect(running) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""
    assert eventually(lambda: [record.record.status for record in caplog.records] == [499])
    assert running.engine.last is None


def test_who_asks_before_sending_a_body_is_told_to_go_on(serve):
    with connect(serve()) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 14\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"prompt":"x"}')
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_who_leaves_before_the_body_is_there_is_nobody(serve, caplog):
    caplog.set_level("INFO", "eightfold.server")
    running = serve()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert eventually(lambda: running.server.service.limiter.held_bytes == 1)
    assert eventually(lambda: [record.record.status for record in caplog.records] == [499])
    assert running.server.service.limiter.held_bytes == 0
    assert running.engine.last is None


def test_a_body_that_does_not_come_is_a_408(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.fields.BODY_SECONDS", 0.05)
    running = serve()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


# ---- Limits.


def test_more_than_may_wait_get_a_429_that_says_when_to_come_back(serve):
    running = serve({"max_num_seqs": 1, "max_waiting": 2}, stuck=True)
    results = [in_background(lambda: running.chat()) for _ in range(3)]
    assert eventually(lambda: running.server.service.limiter.inside == 3)
    raw = running.chat()
    assert (raw.status_code, error_of(raw)["type"]) == (429, "rate_limit_error")
    assert 1 <= int(raw.headers["retry-after"]) <= 60
    with running.openai() as client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="x")
    running.engine.stuck = False
    assert [result().status_code for result in results] == [200, 200, 200]
    assert running.chat().status_code == 200


def test_a_request_that_can_never_be_admitted_is_a_400(serve):
    running = serve({"max_num_seqs": 2, "max_waiting": 2})
    raw = running.post("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2})
    assert (raw.status_code, error_of(raw)["message"]) == (400, "prompts x n: got 6, expected at most 4")
    assert running.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}).status_code == 200


def test_texts_that_are_being_read_are_limited_too(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.service.MAX_HELD_BYTES", 100)
    running = serve()
    assert running.chat("x" * 200).status_code == 429
    assert running.chat("x").status_code == 200
    assert eventually(lambda: running.server.service.limiter.held_bytes == 0)


def test_a_stream_that_has_to_wait_begins_with_comments(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.generation.SIGN_SECONDS", 0.02)
    running = serve(stuck=True)
    with running.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as raw:
        lines = raw.iter_lines()
        assert (raw.status_code, next(lines)) == (200, ": waiting")
        running.engine.stuck = False
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"


def test_a_stream_has_comments_while_it_has_nothing_to_say(serve, monkeypatch):
    monkeypatch.setattr("eightfold.server.generation.SIGN_SECONDS", -1)  # always over
    call = '{"name": "f", "arguments": {}}'
    running = serve(template="{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}", answer=call)
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]}
    with running.http.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as raw:
        lines = [line for line in raw.iter_lines() if line]
    role, called = (next(at for at, line in enumerate(lines) if f'"{word}"' in line) for word in ("role", "tool_calls"))
    assert set(lines[role + 1 : called]) == {": waiting"} and called - role > 10
    assert lines[-1] == "data: [DONE]"


# ---- The end.


def test_at_the_end_running_answers_finish_and_new_ones_are_refused(serve):
    running = serve({"drain_timeout": 20}, stuck=True)
    result = in_background(lambda: running.chat())
    assert eventually(lambda: running.engine.open)
    running.stop_soon()
    assert eventually(lambda: running.http.get("/health").status_code == 503)
    assert running.http.get("/health").json() == {"status": "stopping"}
    raw = running.chat()
    assert (raw.status_code, raw.headers["retry-after"], error_of(raw)["code"]) == (503, "10", "stopping")
    assert running.post("/tokenize", {"prompt": "x"}).status_code == 503
    assert running.http.get("/metrics").status_code == 200
    running.engine.stuck = False
    assert result().json()["choices"][0]["message"]["content"] == "Hello!"
    assert eventually(lambda: not running.engine.is_healthy)  # shut down


@pytest.mark.parametrize("twice", [False, True])
def test_at_the_end_of_the_time_or_when_told_twice_they_are_ended(serve, twice):
    running = serve({"drain_timeout": 20 if twice else 0.05}, stuck=True)
    whole = in_background(lambda: running.chat())
    assert eventually(lambda: len(running.engine.open) == 1)
    begin = time.monotonic()
    running.stop_soon()
    if twice:
        running.stop_soon()
    raw = whole()
    assert (raw.status_code, error_of(raw)["code"]) == (503, "stopping")
    assert eventually(lambda: not running.engine.is_healthy)
    assert time.monotonic() - begin < 5
    assert running.engine.ended == {"aborted": 1}


def test_a_stream_that_is_ended_says_so(serve):
    running = serve({"drain_timeout": 0.05}, answer="word " * 100, seconds=0.01)
    found = in_background(lambda: running.events("/v1/completions", {"prompt": "x", "max_tokens": 250}))
    assert eventually(lambda: running.engine.open)
    running.stop_soon()
    assert found()[-1]["error"]["code"] == "stopping"


# ---- The log and the metrics.


def logged(capsys, count, text=None):
    """Wait for so many lines of the log; return them, and add them as they are to `text`."""
    text = [] if text is None else text

    def there():
        text.append(capsys.readouterr().err)
        return "".join(text).count("\n") >= count

    assert eventually(there)
    return [json.loads(line) for line in "".join(text).splitlines()]


@contextmanager
def logs_set_up():
    """Do what the command does, on the stderr that the test sees."""
    from eightfold.server import logs

    loggers = [logging.getLogger(name) for name in ("eightfold", "uvicorn", "asyncio")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    logs.set_up("info")
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_request_is_one_line_in_the_log_without_its_words(serve, capsys):
    running = serve()
    asked = {"messages": [{"role": "user", "content": "a secret"}]}
    with logs_set_up():
        running.post("/v1/chat/completions?q=hidden", asked, headers={"x-request-id": "mine"})
        running.http.get("/health")
        (line,) = logged(capsys, 1)
    assert {name: line[name] for name in ("id", "path", "status", "generated_tokens", "cached_tokens", "finish")} == {
        "id": "mine",
        "path": "/v1/chat/completions",
        "status": 200,
        "generated_tokens": 6,
        "cached_tokens": 3,
        "finish": "stop",
    }
    assert 0 <= line["ttft"] <= line["seconds"]
    assert "secret" not in json.dumps(line) and "Hello" not in json.dumps(line) and "hidden" not in json.dumps(line)


def test_control_characters_of_a_request_are_escaped_in_the_log(serve, capsys):
    running = serve()
    with logs_set_up():
        running.http.get("/%1b]0;title%07%7f%c2%9b2J?%1b", headers={"x-request-id": "a\x9b2J".encode("latin-1")})
        running.chat(**{"\x1b[2J": 1, "\x7f": 2})
        raw: list[str] = []
        assert len(logged(capsys, 2, raw)) == 2
    assert all(character.isprintable() for character in "".join(raw).replace("\n", ""))


def test_a_fault_is_logged_with_its_place_and_without_its_message(serve, capsys):
    running = serve(fails_after=0)
    with logs_set_up():
        running.chat()
        fault, request = logged(capsys, 2)
    assert fault["exception"] == "RuntimeError" and "fake_engine.py" in fault["traceback"][-1]
    assert (request["status"], request["error"], request["id"]) == (500, "internal_error", fault["id"])
    assert "secret" not in json.dumps(fault)


def test_metrics_count_what_happened(serve):
    running = serve({}, preemptions=2)
    running.chat(n=2)
    running.chat(max_tokens=3)
    running.chat(max_tokens=0)
    running.chat(max_tokens=1)
    assert running.metric("answers_finished_total", reason="stop", model="tiny") == 2
    assert running.metric("answers_finished_total", reason="length") == 2
    assert running.metric("generated_tokens_total") == 6 + 6 + 3 + 1
    assert running.metric("prompt_tokens_total") == 3 * len(running.engine.last[0])
    assert running.metric("time_to_first_token_seconds_count") == 3
    assert running.metric("request_seconds_count") == 3
    assert running.metric("time_per_output_token_seconds_count") == 3  # of a single token there is none
    assert running.metric("http_requests_total", path="/v1/chat/completions", status="200") == 3
    assert running.metric("http_requests_total", path="/v1/chat/completions", status="400") == 1
    assert running.metric("preemptions_total") == 2
    assert (running.metric("kv_cache_blocks"), running.metric("kv_cache_usage_ratio")) == (10, 0)
    text = running.http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("requests_waiting", "requests_running", "prefix_cache_hit_tokens_total", "prompt_tokens_total",
                 "prefix_cache_query_tokens_total"):  # fmt: skip
        assert f"\neightfold_{name}{{" in text.text


# ---- Paths.


def test_paths_are_served_without_v1_too(serve):
    running = serve()
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    assert running.post("/chat/completions", asked).json()["choices"][0]["message"]["content"] == "Hello!"
    assert running.post("/completions", {"prompt": "x"}).json()["choices"][0]["text"] == "Hello!"
    assert running.http.get("/models").json() == running.http.get("/v1/models").json()
    assert running.http.get("/models/tiny").json()["id"] == "tiny"
    assert running.http.get("/models/other").json()["error"]["code"] == "model_not_found"
    with openai.OpenAI(base_url=running.url, api_key="none", max_retries=0) as client:
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "Hello!"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "Embeddings, scores and ranks need a server with a model for them."),
        ("/embeddings", "Embeddings, scores and ranks need a server with a model for them."),
        ("/v1/rerank", "Embeddings, scores and ranks need"),
        ("/v1/audio/transcriptions", "This model reads and writes text only"),
        ("/v1/images/generations", "This model reads and writes text only"),
        ("/api/chat", "Use POST /v1/chat/completions, which is OpenAI's API."),
        ("/api/tags", "Use GET /v1/models."),
        ("/api/pull", "This is not Ollama's API but OpenAI's"),
        ("/v1/messages", "This is Anthropic's API. Use POST /v1/chat/completions"),
        ("/completion", "Use POST /v1/completions"),
        ("/generate", "Use POST /v1/completions"),
        ("/v1/files", "Answer a file of requests with `eightfold run --input-file`."),
        ("/v1/v1/chat/completions", "The base URL has /v1 twice."),
        ("/v1/chat/completions/", "Leave out the slash at the end."),
        ("/nowhere", "Served are POST /v1/chat/completions"),
    ],
)
def test_for_what_others_serve_there_are_words(serve, path, words):
    raw = serve().post(path, {})
    assert (raw.status_code, error_of(raw)["code"]) == (404, "not_found")
    message = error_of(raw)["message"]
    assert message.startswith(f"POST {path!r} is not served here. ") and words in message


@pytest.mark.parametrize("path", ["/", "/v1/models", "/models/tiny", "/health", "/metrics", "/version"])
def test_head_is_get_without_a_body(serve, path):
    running = serve()
    get, head = running.http.get(path), running.http.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert path == "/metrics" or head.headers["content-length"] == str(len(get.content))


def test_options_says_what_is_allowed(serve):
    running = serve()
    for path, allowed in (
        ("/v1/chat/completions", {"POST"}),
        ("/models", {"GET", "HEAD"}),
        ("/health", {"GET", "HEAD"}),
    ):
        raw = running.http.options(path)
        assert (raw.status_code, raw.content, set(raw.headers["allow"].split(", "))) == (204, b"", allowed)
    assert running.http.options("/nowhere").status_code == 404


# ---- The small endpoints.


def test_an_impossible_token_has_a_logprob_that_json_knows(serve):
    running = serve()
    chat = running.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"][0]
    assert [each["logprob"] for each in chat["top_logprobs"]] == [-0.5, -9999.0]
    raw = running.post("/v1/completions", {"prompt": "x", "logprobs": 2}).json()
    assert sorted(raw["choices"][0]["logprobs"]["top_logprobs"][0].values()) == [-9999.0, -0.5]


def test_models_under_all_their_names(serve):
    running = serve({"model_names": ("first/one", "second")})
    with running.openai() as client:
        assert [model.id for model in client.models.list()] == ["first/one", "second"]
        assert client.models.retrieve("first/one").model_extra["max_model_len"] == 256
        with pytest.raises(openai.NotFoundError, match="expected 'first/one'"):
            client.models.retrieve("third")
        assert client.completions.create(model="second", prompt="x").model == "first/one"


def test_tokenize_and_detokenize_are_each_others_inverse(serve):
    running = serve()
    found = running.post("/tokenize", {"prompt": "h\u00e9", "return_token_strs": True}).json()
    assert found["count"] == 3 == len(found["tokens"])
    assert (found["max_model_len"], found["token_strs"]) == (256, ["h", "bytes:\\xc3", "bytes:\\xa9"])
    assert running.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "h\u00e9"}
    chat = running.post("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False})
    assert running.post("/detokenize", {"tokens": chat.json()["tokens"]}).json() == {"prompt": "<|user|>a</s>"}
    for content in ({}, {"tokens": [-1]}, {"tokens": ["a"]}, {"tokens": [True]}, {"tokens": [2**31]}):
        assert running.post("/detokenize", content).status_code == 400
    for strange in (300, 320, 2**31 - 1):  # the model has 320 ids, but the tokenizer no token for all of them
        error = error_of(running.post("/detokenize", {"tokens": [0, strange]}))
        assert (error["message"], error["param"]) == (f"tokens[1]: got {strange}, expected the id of a token", "tokens")
    assert running.post("/tokenize", {}).status_code == 400


def test_version(serve):
    from eightfold import __version__

    assert serve().http.get("/version").json() == {"version": __version__}


def test_who_was_still_reading_when_the_end_began_is_not_admitted():
    from eightfold.server.service import Limiter, ServerSettings

    limiter = Limiter(ServerSettings(model_names=("tiny",)))
    limiter.is_draining = True
    with pytest.raises(ApiError) as caught, limiter.admitted(1):
        pass
    assert (caught.value.status, limiter.inside) == (503, 0)


def told(found: Running, key: str, **body: Any) -> int | None:
    """Return how many cached tokens a client with a key is told of."""
    asked = {"prompt": [1, 2], "max_tokens": 2, **body}
    answer = found.http.post("/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"}).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_each_key_has_its_own_part_of_the_prefix_cache(serve):
    found = serve({"cache_salt_per_key": True})
    assert [told(found, key, **body) for key in "ab" for body in ({}, {"cache_salt": "s"}, {})] == [3] * 6
    salts = found.engine.salts
    assert (salts[0], salts[3]) == (salts[2], salts[5])
    assert len({*salts, ""}) == 5


def test_a_key_has_the_same_part_of_the_prefix_cache_in_either_header(serve):
    for settings in ({}, {"api_keys": ("a", "b")}):
        found = serve({"cache_salt_per_key": True, **settings})
        for headers in ({"authorization": "Bearer a"}, {"x-api-key": "a"}, {"authorization": "bearer a"},
                        {"x-api-key": "b"}):  # fmt: skip
            assert found.post("/v1/completions", {"prompt": [1]}, headers=headers).status_code == 200
        *same, other = found.engine.salts
        assert len(set(same)) == 1 and other not in ("", same[0])


def test_without_a_salt_no_client_is_told_what_others_have_asked(serve):
    found = serve({})
    assert [told(found, "a"), told(found, "a", cache_salt="s"), told(found, "b")] == [None, 3, None]
    assert found.engine.salts == ["", "s", ""]
    assert told(serve({"report_cached_tokens": True}), "a") == 3


@pytest.mark.parametrize("salt", ["", 5, ["a"]])
def test_a_salt_is_a_text(serve, salt):
    body = json.dumps({"prompt": [1], "cache_salt": salt})
    answer = serve().http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")
