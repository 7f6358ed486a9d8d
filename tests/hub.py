"""A hub of this process's own: repositories in memory, behind the few addresses that ``huggingface_hub`` asks for."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe("/".join(parts[2:4]), as_tree=parts[4:5] == ["tree"])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), "/".join(parts[4:]))
        return self._answer(404, b"{}")

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.append(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            name = "me/" + json.loads(body)["name"]
            self.server.repositories.setdefault(name, {})
            return self._answer(200, json.dumps({"url": f"{self.server.address}/{name}"}).encode())
        if parts == ["api", "validate-yaml"]:  # the head of a model card
            return self._answer(200, json.dumps({"errors": [], "warnings": []}).encode())
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":  # "regular" files travel within the commit
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self._answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        revision = commit_id(self.server.repositories[name])
        commit = {"commitUrl": f"{self.server.address}/{name}/commit/{revision}", "commitOid": revision}
        return self._answer(200, json.dumps(commit).encode())

    def _describe(self, name: str, *, as_tree: bool) -> None:
        if name not in self.server.repositories:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.server.repositories[name]
        if as_tree:
            entries = [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()]
            return self._answer(200, json.dumps(entries).encode())
        described = {"id": name, "sha": commit_id(files), "siblings": [{"rfilename": path} for path in files]}
        return self._answer(200, json.dumps(described).encode())

    def _file(self, name: str, path: str) -> None:
        files = self.server.repositories.get(name, {})
        if path not in files:
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._answer(200, files[path], {"X-Repo-Commit": commit_id(files), "ETag": f'"{_etag(files[path])}"'})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


def commit_id(files: dict[str, bytes]) -> str:
    """40 hexadecimal digits of all contents, as a commit has."""
    return hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items()))).hexdigest()


def _etag(content: bytes) -> str:
    """The id that git gives a file of this content; ``huggingface_hub`` compares it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def hub(repositories: Repositories) -> Iterator[_Server]:
    """Serves ``repositories`` (name -> file -> content), which uploads change, at ``.address``."""
    server = _Server(repositories)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
