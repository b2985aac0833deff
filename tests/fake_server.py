"""An OpenAI-compatible HTTP server on this machine that answers with a test's script."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LLAMA_SERVER_MODEL = {"id": "tiny", "object": "model", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}}


class Server(ThreadingHTTPServer):
    """Answers with a test's script; keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Any = {"object": "list", "data": [LLAMA_SERVER_MODEL]}
        self.script: list[Any] = ["Hello!"]
        self.reason: str | None = "stop"  # None: it breaks off
        self.usage: dict[str, int] | None = None
        self.status = 200
        self.body: Any = None
        self.delay_s = 0.0
        self.refusal = 400
        self.refuses: tuple[str, ...] = ()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave early are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        time.sleep(self.server.delay_s)
        if not self.path.endswith("/v1/models"):
            self._send({"error": {"message": "no such path"}}, 404)
        elif self.server.status != 200:
            self._send(self.server.body, self.server.status)
        else:
            self._send(self.server.models)

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.keys.append(self.headers["Authorization"])
        time.sleep(server.delay_s)
        refused = [name for name in server.refuses if name in request]
        if refused:
            body = {"error": {"message": f"unknown field {refused[0]}"}}
            self._send(body, server.refusal)
        elif server.body is not None:
            self._send(server.body, server.status)
        else:
            self._stream(server)

    def _send(self, body: Any, status: int = 200) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(body, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, server: Server) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for part in server.script:
            if isinstance(part, float):
                time.sleep(part)
            elif isinstance(part, bytes):
                self.wfile.write(part)
            elif isinstance(part, dict):
                self._event(part)
            else:
                self._event(completion({"delta": {"content": part}, "finish_reason": None}))
        if server.reason is None:
            return
        self._event(completion({"delta": {}, "finish_reason": server.reason}))
        if server.usage:
            self._event({**completion(None), "usage": server.usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def completion(
    choice: dict[str, Any] | None, kind: str = "chat.completion.chunk"
) -> dict[str, Any]:
    choices = [{"index": 0, **choice}] if choice else []
    return {"id": "1", "object": kind, "created": 1, "model": "tiny", "choices": choices}
