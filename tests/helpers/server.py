"""A real HTTP server on loopback that answers as servers of models do, from a tiny model, and misbehaves when told."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Vectors = Callable[[list[str]], list[list[float]]]


class ModelServer(ThreadingHTTPServer):
    """`/v1/embeddings`, `/tei`, `/cohere`, `/jina`, `/vllm`. Each of `faults` spoils one request; `always` every one.

    A fault is a name, a status, or "body:" and what is sent in place of an answer.
    """

    daemon_threads = True

    def __init__(self, vectors: Vectors) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.vectors = vectors
        self.lock = threading.Lock()
        self.faults: list[str] = []
        self.always = ""
        self.good = 10**9  # answers before `always` begins
        self.elsewhere = ""  # where a status of 3xx points
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busiest = self.busy = 0

    @property
    def texts(self) -> list[str]:
        """Every text that was asked for, in well-formed answers and others."""
        return [text for body in self.asked for text in _texts(body)]

    def url(self, path: str = "/v1/embeddings") -> str:
        """An address."""
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = server.faults.pop(0) if server.faults else ""
            if not fault and server.always:
                server.good -= 1
                fault = server.always if server.good < 0 else ""
            rows = self._rows(body)
        try:
            self._spoiled(fault, rows)
        finally:
            with server.lock:
                server.busy -= 1

    def _rows(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        texts = _texts(body)
        vectors = self.server.vectors(texts)
        if self.path == "/v1/embeddings":
            rows: list[dict[str, Any]] = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        else:
            [query] = self.server.vectors([body.get("query") or body["text_1"]])
            name = "relevance_score" if self.path in ("/cohere", "/jina") else "score"
            scores = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
            rows = [{"index": i, name: score} for i, score in enumerate(scores)]
        random.Random(0).shuffle(rows)  # rerankers sort, and nobody promises an order
        return rows

    def _spoiled(self, fault: str, rows: list[dict[str, Any]]) -> None:
        tree: Any = {"/tei": rows, "/cohere": {"results": rows}, "/jina": {"results": rows}}.get(self.path)
        name = next(key for key in rows[0] if key != "index")
        if fault == "count":
            rows.pop()
        elif fault == "twice":
            rows[0]["index"] = rows[-1]["index"]
        elif fault == "nan":
            rows[0][name] = [float("nan")] * 4 if name == "embedding" else float("nan")
        elif fault == "width":
            rows[0][name] = [*rows[0][name], 1.0]
        elif fault == "wider":
            for row in rows:
                row[name] = [*row[name], 1.0]
        elif fault == "base64":
            for row in rows:
                row[name] = base64.b64encode(np.array(row[name], "<f4").tobytes()).decode()
        elif fault == "slow":
            time.sleep(1.0)
        data = json.dumps({"data": rows} if tree is None else tree).encode()
        if fault.isdigit():
            said = f"status {fault} for {self.headers.get('Authorization', '')}".encode()
            more = {"Location": self.server.elsewhere} if fault.startswith("3") else {}
            self._send(int(fault), said, {"Retry-After": "0.4"} if fault == "429" else more)
        elif fault.startswith("body:"):
            self._send(200, fault.removeprefix("body:").encode())
        elif fault == "garbage":
            self._send(200, b"<html>busy</html>")
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self._send(200, data)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # who asked has gone

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def _texts(body: dict[str, Any]) -> list[str]:
    return next(body[name] for name in ("input", "texts", "documents", "text_2") if name in body)


def questions(bodies: list[dict[str, Any]]) -> set[tuple[str | None, str]]:
    """What requests asked: (query, text), of embeddings (None, text)."""
    return {(body.get("query") or body.get("text_1"), text) for body in bodies for text in _texts(body)}


@contextmanager
def serving(vectors: Vectors) -> Iterator[ModelServer]:
    """A server, as long as the block lasts."""
    server = ModelServer(vectors)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
