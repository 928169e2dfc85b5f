"""A chat endpoint on this machine that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Said = str | int | bytes | tuple[int, dict[str, str]]
"""A reply's text, an HTTP status, a raw body, or a status with headers."""


class FakeEndpoint:
    """Serves `/v1/chat/completions` while it is entered.

    Args:
        answer: What it says to the n-th request (from 0) with this body.

    Attributes:
        requests: The bodies that came.
        keys: Their authorization.
    """

    def __init__(self, answer: Callable[[int, dict[str, Any]], Said]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FakeEndpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                status, headers, content = endpoint._said(number, body)
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def _said(self, number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        said = self.answer(number, body)
        if isinstance(said, bytes):
            return 200, {}, said
        if isinstance(said, int):
            key = (self.keys[number] or "").removeprefix("Bearer ")
            return said, {}, json.dumps({"error": f"no: {key}"}).encode()
        if isinstance(said, tuple):
            return said[0], said[1], b""
        message = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 2}}
        return 200, {}, json.dumps(message | usage).encode()
