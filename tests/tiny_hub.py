"""A Hugging Face hub on this machine (as much of its API as loading a model needs), and a network that is not there."""

import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class TinyHub(http.server.ThreadingHTTPServer):
    """Serves `team/tiny` at the revisions given; other names fail in the ways that the real hub fails.

    `team/gated`: 401, gated. `team/forbidden`: 403. `team/down`: 503. `team/silent`: no answer for `silence` seconds.
    `team/bare`: a model without config.json. Every other name: 401, as the hub answers for names it does not know.
    """

    daemon_threads = True
    silence = 5.0

    def __init__(self, revisions: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}
        self.folders = {self.commits[name]: folder for name, folder in revisions.items()}

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: TinyHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # the names are http.server's
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _respond(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, kind, revision, file = "/".join(parts[:2]), *(parts + ["", "", ""])[2:5]
        if name == "team/silent":
            time.sleep(self.server.silence)
        failures = {"team/gated": (401, "GatedRepo"), "team/forbidden": (403, ""), "team/down": (503, "")}
        failures |= {"team/bare": (404, "EntryNotFound")}
        if name != "team/tiny":
            return self._send(*failures.get(name, (401, "RepoNotFound")), content=b"", body=body)
        commit = self.server.commits.get(revision, revision)
        folder = self.server.folders.get(commit)
        if folder is None:
            return self._send(404, "RevisionNotFound", content=b"", body=body)
        if kind == "tree":
            sizes = {item.name: item.stat().st_size for item in folder.iterdir()}
            entries = [{"type": "file", "path": path, "size": size, "oid": "0"} for path, size in sizes.items()]
            return self._send(200, "", content=json.dumps(entries).encode(), body=body, commit=commit)
        if not (folder / file).is_file():
            return self._send(404, "EntryNotFound", content=b"", body=body, commit=commit)
        return self._send(200, "", content=(folder / file).read_bytes(), body=body, commit=commit)

    def _send(self, status: int, code: str, *, content: bytes, body: bool, commit: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "X-Error-Code": code, "X-Repo-Commit": commit}
        headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Type": "application/json"}
        for header, value in headers.items():
            if value:
                self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def tiny_hub(revisions: dict[str, Path]) -> Iterator[TinyHub]:
    """Run a TinyHub in a thread for the time of a `with` block."""
    hub = TinyHub(revisions)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@contextmanager
def forbidden_network() -> Iterator[None]:
    """Fail if anything in a `with` block as much as tries to open a connection; nothing else forbids it the hub."""
    attempts = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert attempts == []
