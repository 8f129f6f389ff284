"""A real HTTP server that speaks chat completions, and misbehaves as planned."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Messages = list[dict[str, str]]


class ChatServer(ThreadingHTTPServer):
    """``plan[name(messages)]`` lists what happens before the right answer, ``answer(messages)``.

    A number is a status to answer with, a text the model's reply, a dictionary or bytes the body of
    the response, "<drop>" a connection cut off.
    """

    def __init__(self, name: Callable[[Messages], str], answer: Callable[[Messages], str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.answer = name, answer
        self.plan: dict[str, list] = {}
        self.asked: Counter = Counter()
        self.finished: Counter = Counter()
        self.bodies: list[dict] = []
        self.keys: set = set()
        self.dies_after: int | None = None
        self.pause_seconds = 0.0
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, name = self.server, self.server.name(body["messages"])
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.asked[name] += 1
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            dead = server.dies_after is not None and server.finished.total() >= server.dies_after
            planned = server.plan.get(name)
            happens = "<drop>" if dead else planned.pop(0) if planned else None
            if happens is None:
                server.finished[name] += 1
        time.sleep(server.pause_seconds)
        with server.lock:  # before the answer, after which the client may ask again
            server.under_way -= 1
        self._answer(server.answer(body["messages"]) if happens is None else happens)

    def _answer(self, happens):
        if happens == "<drop>":
            self.close_connection = True
            self.connection.close()
        elif isinstance(happens, bytes):
            self._send(200, happens)
        elif isinstance(happens, int):
            self._send(happens, json.dumps({"error": {"message": f"status {happens}"}}).encode())
        else:
            body = happens if isinstance(happens, dict) else completion(happens)
            self._send(200, json.dumps(body).encode())

    def _send(self, status: int, content: bytes):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)


def completion(content: object, finish: str | None = "stop") -> dict:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def serving(server: ChatServer):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
