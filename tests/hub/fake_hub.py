"""A hub on localhost that speaks the few endpoints of Hugging Face and ModelScope that Eightfold's clients ask."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"


@dataclass
class Repository:
    """One model: its commits, newest last, and who may read it."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    needs_token: bool = False
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[branch] = self.branches["master" if branch == "main" else branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return next(((known, files) for known, files in self.commits if known == sha), None)


class FakeHub:
    """The hub, and what it was asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []  # METHOD path
        self.tokens: set[str] = set()
        self.breaks_after: int | None = None  # bytes of a file, after which the connection is cut, once
        self.ranges: list[str] = []
        hub = self

        class Handler(_Handler):
            def __init__(self, *args):
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        self.models[name] = Repository(**settings)
        self.models[name].commit(files)
        return self.models[name]

    def fetched(self) -> list[str]:
        """Return the files that were asked for, without what stands before their names."""
        found = (re.search(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)|GET .*FilePath=([^&]+)", line) for line in self.asked)
        return sorted({match[1] or match[2] for match in found if match})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_GET

    def do_POST(self):
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _serve(self, body: bytes = b""):
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[-1] for key, values in parse_qs(url.query).items()}
        routes = (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs),
            (r"/lfs/(\w+)", self._upload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/v1/models/([^/]+/[^/]+)/repo/files", self._ms_files),
            (r"/api/v1/models/([^/]+/[^/]+)/repo", self._ms_file),
        )
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                answer(*match.groups(), query=query, body=body)
                return
        self._json({"error": "not found"}, 404)

    # --- Hugging Face

    def _readable(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit, or answer why not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        found = self.hub.models.get(name)
        if token and token != TOKEN:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif found is None or (found.needs_token and token != TOKEN):
            self._refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
        elif (commit := found.at(revision or "main")) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit
        return None

    def _info(self, name, revision, *, query, body):
        if commit := self._readable(name, revision):
            sha, files = commit
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": sha,
                    "siblings": siblings,
                    "tags": [],
                    "private": self.hub.models[name].is_private,
                }
            )

    def _tree(self, name, revision, *, query, body):
        if commit := self._readable(name, revision):
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in commit[1].items()
            ]
            self._json(rows)

    def _file(self, name, revision, path, *, query, body):
        commit = self._readable(name, revision)
        if commit is None:
            return
        if self.hub.models[name].is_gated:
            self._refuse(403, "GatedRepo", "Access to it is restricted")
            return
        content = commit[1].get(path)
        if content is None:
            self._refuse(404, "EntryNotFound", "no such file")
            return
        self._bytes(content, {"X-Repo-Commit": commit[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _bytes(self, content: bytes, headers: dict[str, str]):
        begin, end, span = 0, len(content), self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", span):
            begin, end = int(match[1]), int(match[2]) + 1 if match[2] else end
            self.hub.ranges.append(span)
        self.send_response(206 if span else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if span:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks_after is not None and end - begin > self.hub.breaks_after:
            self.wfile.write(content[begin : begin + self.hub.breaks_after])
            self.hub.breaks_after = None
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[begin:end])

    def _writes(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._refuse(401, "", "Invalid credentials in Authorization header")
        return False

    def _create(self, *, query, body):
        if self._writes():
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name not in self.hub.models:
                self.hub.models[name] = Repository(
                    is_private=bool(asked.get("private")) or asked.get("visibility") == "private"
                )
                self.hub.models[name].commit({})
            self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def _validate(self, *, query, body):
        assert json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [], "warnings": []})

    def _branch(self, name, branch, *, query, body):
        if self._writes():
            model = self.hub.models[name]
            model.branches.setdefault(branch, model.branches["main"])
            self._json({})

    def _preupload(self, name, revision, *, query, body):
        if self._writes():
            files = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            self._json({"files": files})

    def _lfs(self, name, *, query, body):
        if self._writes():
            objects = [
                {"oid": each["oid"], "size": each["size"]}
                if each["oid"] in self.hub.blobs
                else {**each, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid, *, query, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._json({})

    def _commit(self, name, revision, *, query, body):
        if not self._writes():
            return
        files = dict(self.hub.models[name].at(revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.models[name].commit(files, revision)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}"})

    # --- ModelScope

    def _ms_files(self, name, *, query, body):
        found = self.hub.models.get(name)
        commit = found.at(query["Revision"]) if found else None
        if commit is None:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            return
        rows = [
            {"Path": path, "Name": path, "Size": len(content), "Type": "blob",
             "Sha256": hashlib.sha256(content).hexdigest()}
            for path, content in commit[1].items()
        ]  # fmt: skip
        self._json({"Code": 200, "Success": True, "Data": {"Files": rows}})

    def _ms_file(self, name, *, query, body):
        self._bytes(self.hub.models[name].at(query["Revision"])[1][query["FilePath"]], {})

    # --- answers

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _refuse(self, status: int, code: str, message: str):
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
