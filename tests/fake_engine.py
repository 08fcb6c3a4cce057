"""A small server that stands for vLLM or SGLang: its log, its health, its answers; for tests.

Run as a script with the engine's own command line (only --port is looked at). FAKE_ENGINE says how
it misbehaves, words separated by spaces: dies or hangs (before it is healthy), stubborn (ignores
SIGINT and SIGTERM), low-acceptance, no-retrieval, mojibake, bad-arguments, refuses-tools. It starts
a child of its own, as engines do, whose process id it writes to FAKE_ENGINE_PIDS.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = os.environ.get("FAKE_ENGINE", "").split()
LOG = """INFO Loading safetensors checkpoint shards:  50% Completed | 41/82
INFO Model loading took 55.4 GiB and 91.2 seconds
INFO Available KV cache memory: 21.36 GiB
INFO GPU KV cache size: 368,420 tokens
INFO Capturing CUDA graphs (decode, FULL)
"""
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0"}} 100.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} 60.0
"""
seen: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, "text/plain", b"")
        elif self.path == "/metrics":
            first = 6.0 if "low-acceptance" in FAULTS else 83.0
            self._send(200, "text/plain", METRICS.format(first=first).encode())
        elif self.path == "/seen":
            self._send(200, "application/json", json.dumps(seen).encode())
        else:
            self._send(404, "text/plain", b"")

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        seen.append({"body": body, "key": self.headers.get("Authorization")})
        content = body["messages"][0]["content"]
        if not body.get("tools"):
            self._answer(content)
        elif "refuses-tools" in FAULTS:
            self._send(400, "application/json", b'{"error": "no tool parser"}')
        else:
            self._stream(body["tools"][0]["function"]["name"])

    def _answer(self, content: str) -> None:
        text = "I do not know."
        code = re.search(r"The access code is (\S+)\.", content)
        if "17 plus 25" in content:
            text = "42"
        elif code and "no-retrieval" not in FAULTS:
            text = f"It is {code[1]}."
        elif "Repeat" in content:
            text = content.partition(": ")[2]
            if "mojibake" in FAULTS:
                text = text[:4] + "\N{REPLACEMENT CHARACTER}" + text[5:]
        document = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(content.split()) + 8},
        }
        self._send(200, "application/json", json.dumps(document).encode())

    def _stream(self, tool: str) -> None:
        arguments = {} if tool == "get_time" else {"hour": 7, "label": "run", "repeat": True}
        if "bad-arguments" in FAULTS and arguments:
            arguments["hour"] = "7"
        text = json.dumps(arguments)
        pieces = [{"name": tool, "arguments": ""}, {"arguments": text[:1]}, {"arguments": text[1:]}]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in pieces:
            self._event({"delta": {"tool_calls": [{"index": 0, "function": piece}]}})
        self._event({"delta": {}, "finish_reason": "tool_calls"})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice: dict) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    if "stubborn" in FAULTS:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if "FAKE_ENGINE_PIDS" in os.environ:
        Path(os.environ["FAKE_ENGINE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    print(LOG, flush=True)
    time.sleep(0.1)
    if "dies" in FAULTS:
        child.kill()
        sys.exit("torch.OutOfMemoryError: CUDA out of memory")
    if "hangs" in FAULTS:
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("INFO Application startup complete.", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
