"""A real HTTP server that speaks chat completions and scores answers by their text, with faults.

``Proxy`` has the same faults, and passes on what another server says.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import ProxyHandler, Request, build_opener

FAULTS = ("429", "500", "503", "drop", "half", "json", "shape", "slow")


def score(answer: str) -> int:
    """0 to 100, the same for the same text."""
    return int(hashlib.sha256(answer.encode()).hexdigest()[:8], 16) % 101


def answer_in(body: dict) -> str:
    return body["messages"][0]["content"].rpartition("\n</answer>")[0].partition("<answer>\n")[2]


@contextmanager
def running(server: "JudgeServer") -> Iterator["JudgeServer"]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class JudgeServer(ThreadingHTTPServer):
    """``reply(answer)`` is the text of a reply, ``top(answer)`` the likeliest first tokens, if any.

    The answer is what ``subject(body)`` finds in a request; requests are counted by it.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.subject = answer_in
        self.reply = lambda answer: str(score(answer))
        self.top = None
        self.status = None
        """``status(answer, body)`` is a status and error object in place of a reply, or None."""
        self.fault_rate, self.faulty_attempts, self.seed = 0.0, 5, 0
        self.retry_after, self.slow_seconds, self.pause_seconds = "0.01", 1.5, 0.0
        self.usage = {"prompt_tokens": 100, "completion_tokens": 1}
        self.asked: Counter = Counter()
        self.answered: Counter = Counter()
        self.met: Counter = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict] = []
        self.keys: set = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """A client that went away is part of the tests."""

    def fault(self, answer: str) -> str | None:
        stream = random.Random(f"{self.seed}/{answer}/{self.asked[answer]}")
        if self.asked[answer] > self.faulty_attempts or stream.random() >= self.fault_rate:
            return None
        return stream.choices(FAULTS, weights=(3, 3, 2, 3, 3, 2, 2, 0.4))[0]

    def completion(self, answer: str, body: dict) -> dict:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        choice["message"]["content"] = self.reply(answer)
        if self.top is not None and body.get("logprobs"):
            tops = [{"token": token, "logprob": p, "bytes": None} for token, p in self.top(answer)]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]} | (
            {"usage": self.usage} if self.usage else {}
        )


class Proxy(JudgeServer):
    """Says what ``upstream`` says; what it has said to a request it is not asked for again."""

    def __init__(self, upstream: str):
        super().__init__()
        self.upstream = upstream
        self.said: dict[str, dict] = {}
        self.n_passed_on = 0
        self.one_each: dict[str, threading.Lock] = {}

    def completion(self, _: str, body: dict) -> dict:
        key = json.dumps(body, sort_keys=True)
        with self.lock:
            mine = self.one_each.setdefault(key, threading.Lock())
        with mine:
            if key not in self.said:
                self.said[key] = self._pass_on(body)
        return self.said[key]

    def _pass_on(self, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.upstream}/chat/completions", json.dumps(body).encode(), headers)
        with build_opener(ProxyHandler({})).open(request, timeout=120) as response:
            said = json.load(response)
        with self.lock:
            self.n_passed_on += 1
        return said


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, answer = self.server, self.server.subject(body)
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.asked[answer] += 1
            server.times.setdefault(answer, []).append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.fault(answer)
            server.met[fault] += 1
        time.sleep(server.pause_seconds)
        refused = server.status and server.status(answer, body)
        with server.lock:
            server.under_way -= 1
            if fault in (None, "slow") and not refused:
                server.answered[answer] += 1
        if refused:
            self._send(refused[0], json.dumps({"error": {"message": "no", **refused[1]}}))
        else:
            self._answer(answer, body, fault)

    def _answer(self, answer: str, body: dict, fault: str | None):
        reply = json.dumps(self.server.completion(answer, body))
        if fault in ("429", "500", "503"):
            self._send(int(fault), json.dumps({"error": {"message": f"status {fault}"}}))
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "half":
            self._send(200, reply[: len(reply) // 2], claims=len(reply))
            self.close_connection = True
        elif fault == "json":
            self._send(200, "<html>a proxy speaks</html>")
        elif fault == "shape":
            self._send(200, json.dumps({"error": {"message": "overloaded"}}))
        else:
            time.sleep(self.server.slow_seconds if fault == "slow" else 0)
            self._send(200, reply)

    def _send(self, status: int, text: str, claims: int | None = None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(claims or len(text)))
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(text.encode())
