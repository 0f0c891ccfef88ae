"""A model hub on this machine: the part of the hub's HTTP API that creates, fills and reads a repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Holds repositories in memory.

    Attributes:
        files: Contents by repository and path.
        commits: Message of each commit.
        created: Fields of each call that creates a repository.
        tokens: Tokens of the calls that write.
        read: Revision and token of each call that asks what a repository holds.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.read: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: object) -> None:
        self._send(json.dumps(document).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.tokens.add(self.headers["Authorization"])
        where = self.path.partition("?")[0]
        if where == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo in hub.files:
                self._send(json.dumps({"url": f"{hub.url}/{repo}"}).encode(), 409)
                return
            hub.files[repo] = {}
            self._json({"url": f"{hub.url}/{repo}"})
        elif where.startswith("/api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in where:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in where:
            repo = where.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    hub.commits.append(entry["value"]["summary"])
                else:
                    hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = f"{len(hub.commits):040x}"
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"})
        else:
            self._send(b"", 404)

    def do_GET(self) -> None:
        hub = self.server
        where = self.path.partition("?")[0]
        sha = f"{len(hub.commits):040x}"
        if where.startswith("/api/models/"):
            repo, _, revision = where.removeprefix("/api/models/").partition("/tree/")[0].partition("/revision/")
            hub.read.append((revision, self.headers["Authorization"]))
            if repo not in hub.files:
                self._send(b"{}", 404, X_Error_Code="RepoNotFound")
                return
            if "/tree/" in where:
                files = hub.files[repo].items()
                self._json([{"type": "file", "path": name, "size": len(f), "oid": "0"} for name, f in files])
                return
            self._json({"_id": "0", "id": repo, "sha": sha, "siblings": []})
            return
        repo, _, file = where.lstrip("/").partition("/resolve/")
        name = file.partition("/")[2]
        if name not in hub.files.get(repo, {}):
            self._send(b"", 404, X_Error_Code="EntryNotFound" if repo in hub.files else "RepoNotFound")
            return
        content = hub.files[repo][name]
        self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(timeout=5)
