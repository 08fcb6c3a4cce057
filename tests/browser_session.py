"""A headless Chromium that a test drives, by its remote debugging protocol."""

import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from websockets.sync.client import ClientConnection, connect

from browser import CHROMIUM


class Page:
    """The one tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        self._until(lambda: self.run(condition), condition)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @staticmethod
    def _until(holds: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, f"waited for {what}"
            time.sleep(0.05)


@contextmanager
def opened(url: str, profile: Path) -> Iterator[Page]:
    """The page at ``url`` in a browser of its own."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--window-size=900,900", "--remote-debugging-port=0", url,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        Page._until(port_file.exists, "the browser")
        Page._until(lambda: port_file.read_text().strip(), "its port")
        base = f"http://127.0.0.1:{port_file.read_text().split()[0]}"
        Page._until(lambda: _tab(base), "the tab")
        with connect(_tab(base), max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait()


def _tab(base: str) -> str:
    try:
        tabs = httpx2.get(f"{base}/json/list").json()
    except httpx2.HTTPError:
        return ""
    return next((tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"), "")
