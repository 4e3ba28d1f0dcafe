"""A stand-in for a judge: a small real HTTP server with an OpenAI-compatible chat route that answers by rule."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: From the request's body to (status, reply). A reply in bytes is the whole answer.
Rule = Callable[[dict[str, Any]], tuple[int, str | bytes]]


@contextmanager
def judging(rule: Rule) -> Iterator[tuple[str, list[dict[str, Any]], list[str]]]:
    """Its base URL, every request's body, and every request's key."""
    bodies: list[dict[str, Any]] = []
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            keys.append(self.headers["Authorization"])
            status, reply = rule(body)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            whole = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            told = whole if status == 200 else {"error": {"message": reply}}
            data = reply if isinstance(reply, bytes) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies, keys
        finally:
            server.shutdown()
            thread.join()
