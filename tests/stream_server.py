"""A data set of a Hugging Face hub on this machine, one of whose files can be made to fail as real servers do."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

NAME = "team/stream"
"""The only data set there is."""


@dataclass
class Fault:
    """What happens to downloads of a file: to `left` of them (None: all) after the first `skip`."""

    kind: Literal["drop", "503", "stall", "trickle"]
    file: str
    left: int | None = None
    skip: int = 0
    after: int = 0
    """Bytes of the body that are sent before the connection is dropped, or nothing more comes, or one a moment."""


class StreamServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as NAME, at one commit; `fault` may be set and unset while it runs."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commit = hashlib.sha1(NAME.encode()).hexdigest()
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.is_closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_of(self, file: str) -> Fault | None:
        """The fault of the download of `file` that begins now; counts it."""
        with self._lock:
            fault = self.fault
            if fault is None or fault.file != file or fault.left == 0:
                return None
            if fault.skip:
                fault.skip -= 1
                return None
            if fault.left is not None:
                fault.left -= 1
            return fault

    def downloads(self, file: str) -> int:
        """How often the file was asked for."""
        return sum(line.startswith("GET") and line.endswith(f"/{file}") for line in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: StreamServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:  # the names are http.server's
        self.rfile.read(int(self.headers["Content-Length"]))
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith(f"/datasets/{NAME}/resolve/"):
            return self._send_file(path.rsplit("/", 1)[1])
        about = path.removeprefix(f"/api/datasets/{NAME}")
        if about == path:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if about == "" or about.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self._send_json({"id": NAME, "sha": self.server.commit, "siblings": siblings, "tags": []})
        if about.startswith(("/tree/", "/paths-info/")):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            return self._send_json(entries)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str) -> None:
        content = self.server.files.get(name)
        headers = {"X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes"}
        if content is None:
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        fault = self.server.fault_of(name) if self.command == "GET" else None
        if fault is not None and fault.kind == "503":
            return self._send(503, b"", headers)
        status, total = 200, len(content)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or total), total - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        return self._send(status, content, headers, fault)

    def _send(self, status: int, content: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for header, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(header, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have given up
            if self.command != "HEAD":
                self.wfile.write(content if fault is None else content[: fault.after])
        if fault is not None:
            self.close_connection = True
            for byte in content[fault.after :] if fault.kind in ("stall", "trickle") else b"":
                if self.server.is_closing.wait(0.2):
                    return
                if fault.kind == "trickle":
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(bytes([byte]))


@contextmanager
def stream_server(folder: Path) -> Iterator[StreamServer]:
    """Run a StreamServer in a thread for the time of a `with` block."""
    server = StreamServer(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.is_closing.set()
        server.shutdown()
        server.server_close()
