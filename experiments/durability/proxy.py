"""An HTTP proxy that is a bad network: it delays, drops, cuts answers short, and answers itself.

Faults by name, each drawn for every request:
    pass           handed on, and the answer back
    delay          the same after a wait
    drop before    the connection is closed; the server never hears of it
    drop after     the server has done it; the connection is closed without an answer
    cut            the server has done it; its answer ends in the middle
    429, 500, 503  answered so; the server never hears of it
    500 after      the server has done it, and 500 is answered
"""

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS: Mapping[str, float] = {
    "pass": 0.60, "delay": 0.08, "drop before": 0.06, "drop after": 0.06, "cut": 0.06,
    "429": 0.03, "500": 0.03, "503": 0.04, "500 after": 0.04,
}  # fmt: skip
"""How often each is drawn."""
LONGEST_S = 0.5
"""Of a delay."""


class Proxy(ThreadingHTTPServer):
    """Listens at a free port of this machine.

    Args:
        port: of the server behind it, on this machine.
        draw: what is done to the requests, in the order in which they come.
        faults: how often each is drawn.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, draw: random.Random, faults: Mapping[str, float] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.behind, self.faults = port, faults
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.done: Counter[str] = Counter()
        """What was done, by name."""
        self._draw, self._lock = draw, threading.Lock()

    def next_fault(self) -> tuple[str, float, float]:
        """Draw what is done to the next request, how long a delay would be, and where a cut."""
        with self._lock:
            (name,) = self._draw.choices([*self.faults], [*self.faults.values()])
            self.done[name] += 1
            return name, self._draw.uniform(0, LONGEST_S), self._draw.random()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: that connections break is what it is for."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, delay_s, where = self.server.next_fault()
        if fault == "drop before":
            return self._drop()
        if fault in ("429", "500", "503"):
            return self._answer(int(fault), [("Retry-After", "0")] if fault == "429" else [], b"{}")
        if fault == "delay":
            time.sleep(delay_s)
        try:
            status, headers, answer = self._hand_on(body)
        except OSError:  # the server itself is away
            return self._drop()
        if fault == "drop after":
            return self._drop()
        if fault == "500 after":
            return self._answer(500, [], b"{}")
        if fault == "cut":
            self._answer(status, headers, answer, int(where * len(answer)))
            return self._drop()
        return self._answer(status, headers, answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _any  # noqa: N815  as the base calls them

    def _hand_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        with contextlib.closing(behind):
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            headers["Host"] = f"127.0.0.1:{self.server.behind}"
            behind.request(self.command, self.path, body, headers)
            answer = behind.getresponse()
            dropped = ("transfer-encoding", "content-length", "connection")
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
            return answer.status, kept, answer.read()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:length])

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxied(port: int, draw: random.Random, faults: Mapping[str, float] = FAULTS) -> Iterator[Proxy]:
    """Run a proxy before a server of this machine while the block lasts."""
    proxy = Proxy(port, draw, faults)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
