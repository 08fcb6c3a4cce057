"""A Hugging Face hub for tests: folders of this machine as repositories, over HTTP with ranges."""

import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Hub:
    """Where it is, and what was fetched: (file, first byte, how many)."""

    address: str
    fetched: list[tuple[str, int, int]] = field(default_factory=list)

    def bytes_of(self, ending: str) -> int:
        return sum(count for name, _, count in self.fetched if name.endswith(ending))


class Server(ThreadingHTTPServer):
    """Quiet when a client has seen enough."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serve(repositories: Mapping[str, Path], *, ranges: bool = True) -> Iterator[Hub]:
    """Serve folders under names ORG/NAME. Without ``ranges`` every file is sent whole."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            for name, folder in repositories.items():
                if path.startswith(f"/api/models/{name}/tree/"):
                    return self._send(200, json.dumps(_tree(folder)).encode())
                prefix = f"/{name}/resolve/main/"
                file = folder / path.removeprefix(prefix)
                if path.startswith(prefix) and file.is_file():
                    return self._file(file)
            return self._send(404, b"")

        def _file(self, file: Path) -> None:
            data, begin, status = file.read_bytes(), 0, 200
            match = RANGE.fullmatch(self.headers.get("Range", ""))
            if ranges and match is not None:
                begin, status = int(match[1]), 206
                data = data[begin : int(match[2]) + 1]
            hub.fetched.append((file.name, begin, len(data)))
            self._send(status, data)

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = Server(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": "0" * 40,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
