"""A tq serve of a test's own, and HTTP without a client library. Standard library only."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

TQ = sys.argv[1] if len(sys.argv) > 1 else ""
MODEL = os.environ.get("TQ_TEST_SMOLLM2", "")
GEMMA = os.environ.get("TQ_TEST_GEMMA", "")
# Profiles are made once for all tests.
CACHE = os.environ.get("TQ_TEST_CACHE") or os.path.join(tempfile.gettempdir(), "tq_test_cache")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**changes):
    result = {k: v for k, v in os.environ.items() if not k.startswith(("TURBOQUANT_", "XDG_"))}
    os.makedirs(CACHE, exist_ok=True)
    result.update(XDG_CACHE_HOME=CACHE, HOME=CACHE, NO_COLOR="1")
    result.update(changes)
    return result


class Server:
    """Ends when its block ends. Log lines are JSON."""

    def __init__(self, *arguments, model=MODEL, ready=True, **changes):
        self.port = free_port()
        self.folder = tempfile.mkdtemp(prefix="tq_serve_")
        self.log_path = os.path.join(self.folder, "log")
        command = [TQ, "serve", "-m", model, "--port", self.port, "--log-format", "json",
                   *([] if "--threads" in arguments else ["--threads", 1]), *arguments]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([str(a) for a in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            env=environment(**changes))
        if ready:
            self.wait_ready()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_ready(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError("tq serve ended: " + self.log())
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError("tq serve was not ready: " + self.log())

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def requests_logged(self):
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == "request"]

    def ask(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body as bytes)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            sent = {} if body is None else {"Content-Type": "application/json"}
            sent.update(headers or {})
            data = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path, headers=None):
        status, _, body = self.ask("GET", path, headers=headers)
        return status, body

    def get_json(self, path, headers=None):
        status, body = self.get(path, headers)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def post(self, path, body, headers=None, timeout=60):
        """(status, JSON)"""
        status, _, answer = self.ask("POST", path, body, headers, timeout)
        return status, json.loads(answer)

    def chat(self, text, n=16, **more):
        """The JSON of a greedy answer."""
        body = {"messages": text if isinstance(text, list) else [{"role": "user", "content": text}], "max_tokens": n,
                "temperature": 0, **more}
        status, answer = self.post("/v1/chat/completions", body)
        assert status == 200, (status, answer)
        return answer

    def busy(self):
        return self.get_json("/props")["context"]["busy"]

    def wait_idle(self, seconds=3):
        """Seconds until no slot is busy."""
        start = time.monotonic()
        while self.busy() > 0:
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"still busy after {seconds} s")
            time.sleep(0.02)
        return time.monotonic() - start

    def metric(self, name):
        for line in self.get("/metrics")[1].decode().splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)


class RawStream:
    """A streamed request over a bare socket, so that a test can see every byte and hang up at any time."""

    def __init__(self, server, body, path="/v1/chat/completions", headers=""):
        data = json.dumps({"stream": True, **body}).encode()
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.socket.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
                            f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = {}
        while line := self.file.readline().strip():
            name, value = line.decode().split(":", 1)
            self.headers[name.lower()] = value.strip()

    def lines(self):
        """The stream's lines, without the chunks' framing."""
        rest = b""
        while True:
            size = int(self.file.readline() or b"0", 16)
            rest += self.file.read(size)
            self.file.readline()
            *whole, rest = rest.split(b"\n")
            yield from (line.decode() for line in whole if line)
            if size == 0:
                return

    def events(self):
        """The events' JSON; the last one may be "[DONE]"."""
        for line in self.lines():
            if line.startswith("data: "):
                yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])

    def close(self):
        self.file.close()
        self.socket.close()


def text_of(events):
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e != "[DONE]" and e.get("choices"))


def main(cases):
    """Runs one class of tests: SCRIPT TQ CLASS."""
    if not MODEL:
        print("SKIPPED: TQ_TEST_SMOLLM2 is not set")
        sys.exit(77)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(cases[sys.argv[2]])
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    sys.exit(0 if result.wasSuccessful() else 1)
