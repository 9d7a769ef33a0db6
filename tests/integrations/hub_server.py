"""A small server that speaks as much of the Hub's HTTP API as pushing and loading adapters takes; loopback only."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: files of each commit, by repository and by hash or branch.
        requests: how many requests came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, Files]] = {}
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, branch: str, files: Files) -> str:
        """Adds files on top of a branch; returns the hash of the new commit."""
        revisions = self.commits.setdefault(repository, {})
        whole = {**revisions.get(branch, {}), **files}
        digest = hashlib.sha1(repr(sorted(whole.items())).encode()).hexdigest()
        revisions[digest] = revisions[branch] = whole
        return digest

    def hash_of(self, repository: str, revision: str) -> str:
        revisions = self.commits[repository]
        return next(key for key, files in revisions.items() if len(key) == 40 and files is revisions[revision])


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name'].rpartition('/')[2]}"
            self.server.commits.setdefault(name, {"main": {}})
            return self.json({"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.json({"files": [file | {"shouldIgnore": False} for file in files]})
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            self.server.commits[match[1]].setdefault(match[2], {})
            return self.json({})
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path.partition("?")[0]):
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            digest = self.server.commit(match[1], match[2], added)
            url = f"{self.server.url}/{match[1]}/commit/{digest}"
            return self.json({"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})
        return self.answer(404, X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.path == "/api/whoami-v2":
            return self.json({"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(r"/(?:api/models/)?(.+?)/(?:resolve|revision)/([^/]+)(?:/(.+))?", self.path):
            return self.revision(match[1], match[2], match[3])
        if match := re.fullmatch(r"/api/models/([^?]+)", self.path):
            return self.revision(match[1], "main", None)
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def revision(self, repository: str, revision: str, path: str | None) -> None:
        revisions = self.server.commits.get(repository)
        if revisions is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in revisions:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        digest = self.server.hash_of(repository, revision) if revisions[revision] else "0" * 40
        if path is None:
            siblings = [{"rfilename": name} for name in revisions[revision]]
            return self.json({"id": repository, "sha": digest, "siblings": siblings, "tags": [], "private": False})
        content = revisions[revision].get(path)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=digest)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server in a thread of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
