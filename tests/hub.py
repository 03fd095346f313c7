"""A small Hub on 127.0.0.1: enough of its HTTP API for the real client to push a folder to it, and to pull it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub


COMMIT = "0" * 40


class LocalHub(ThreadingHTTPServer):
    """Keeps the files of all commits in `files`, by repository and path, and each commit's own in `commits`.

    `faults` are what the next requests whose path holds a word are answered with, by that word: a status, "silence" or
    "reset"; `requests` are methods and paths, `created` the repositories that were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, bytes]] = []
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.created: list[dict] = []
        self.patience = threading.Event()  # set when silent requests are to end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serve until the block ends."""
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.patience.set()
            hub.shutdown()
            thread.join()


def talk_to(url, monkeypatch) -> None:
    """Let the client of this process, which reads its settings when it is imported, talk to a server, unpaused."""
    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", url + resolve)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one that was made has another address
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._resolve()
        elif self._fails():
            return
        elif self.path == "/api/whoami-v2":
            self._answer({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        else:
            self._answer({"error": "not found"}, 404)

    def _resolve(self) -> None:
        if self._fails():
            return
        repository, path = self.path.removeprefix("/").split("/resolve/")
        content = self.server.files.get(repository, {}).get(path.split("/", 1)[1])
        if content is None:
            self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(content, 200, facts | {"Content-Type": "application/octet-stream"})

    def _fails(self) -> bool:
        """Answer with the next planted fault, if there is one for this path."""
        self.server.requests.append(f"{self.command} {self.path}")
        planned = next((codes for word, codes in self.server.faults.items() if word in self.path and codes), None)
        if planned:
            self._answer_with(planned.pop(0))
        return planned is not None

    def _answer_with(self, fault: int | str) -> None:
        if isinstance(fault, int):
            self._answer({"error": "planted"}, fault)
            return
        if fault == "silence":
            self.server.patience.wait()
        self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._fails():
            return
        if self.path == "/api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            name = (
                request["name"]
                if "/" in request["name"]
                else f"{request.get('organization') or 'user'}/{request['name']}"
            )
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").split("/commit/")[0]
            entries = [json.loads(line) for line in body.splitlines()]
            files = [entry["value"] for entry in entries if entry["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self.server.files[repository] |= self.server.commits[-1]
            facts = {"commitOid": COMMIT, "commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}"}
            if "create_pr=1" in self.path:
                facts["pullRequestUrl"] = f"{self.server.url}/{repository}/discussions/1"
            self._answer(facts)
        elif "/branch/" in self.path:
            self._answer({})
        else:
            self._answer({"error": "not found"}, 404)

    def _answer(self, payload: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(payload).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""
