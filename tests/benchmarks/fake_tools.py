"""Scripts that print what llama.cpp's tools print, for tests that build nothing."""

from __future__ import annotations

import sys
from pathlib import Path

PYTHON = sys.executable
ENCODED = """\
main: loading model: model.gguf
WARN: This is an experimental CLI for testing multimodal capability.
      For normal use cases, please use the standard llama-cli
encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
mtmd batch encoding done in 812 ms
decoding image batch 1/1, n_tokens_batch = 256
image decoded (batch 1/1) in 301 ms
"""
"""The log of llama-mtmd-cli."""
SPEED = """\
[
  {
    "build_commit": "unknown",
    "n_threads": 2,
    "n_prompt": 0,
    "n_gen": 32,
    "n_depth": 285,
    "avg_ns": 200000000,
    "stddev_ns": 0,
    "avg_ts": 160.000000,
    "stddev_ts": 0.000000,
    "samples_ns": [ 200000000 ],
    "samples_ts": [ 160 ]
  }
]
"""
"""What llama-bench prints with `-o json`."""
_SERVER = """\
import base64, http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        Handler.requests += 1
        self.send_response(503 if Handler.requests < 3 else 200)
        self.end_headers()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        assert base64.b64decode(url.split(",")[1]).startswith(b"\\\\x89PNG")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": ping\\n\\n")
        for delta in ({"role": "assistant", "content": None}, {"content": "A red "}, {"content": "circle."}, {}):
            event = {"choices": [{"finish_reason": None, "index": 0, "delta": delta}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")

with open(os.environ.get("SERVER_STARTS", os.devnull), "a") as starts:
    starts.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make_tool(path: Path, code: str) -> Path:
    """Write an executable Python script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{PYTHON}\n{code}")
    path.chmod(0o755)
    return path


def make_tools(folder: Path) -> Path:
    """Write all three tools into a folder and return it."""
    make_tool(folder / "llama-mtmd-cli", f"import sys; sys.stderr.write({ENCODED!r}); print('A red circle.')")
    make_tool(folder / "llama-bench", f"print({SPEED!r})")
    make_tool(folder / "llama-server", _SERVER.replace("\\\\x89", "\\x89"))
    return folder
