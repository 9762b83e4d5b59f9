"""A tq serve of a test's own. Standard library only."""

import json
import os
import socket
import sys
import tempfile
import time
import unittest

from server_process import ServerProcess, free_port, serve_command

TQ = sys.argv[1] if len(sys.argv) > 1 else ""
MODEL = os.environ.get("TQ_TEST_SMOLLM2", "")
GEMMA = os.environ.get("TQ_TEST_GEMMA", "")
# Profiles are made once for all tests.
CACHE = os.environ.get("TQ_TEST_CACHE") or os.path.join(tempfile.gettempdir(), "tq_test_cache")


def environment(**changes):
    result = {k: v for k, v in os.environ.items() if not k.startswith(("TURBOQUANT_", "XDG_"))}
    os.makedirs(CACHE, exist_ok=True)
    result.update(XDG_CACHE_HOME=CACHE, HOME=CACHE, NO_COLOR="1")
    result.update(changes)
    return result


class Server(ServerProcess):
    """A tq serve; it is ready. Log lines are JSON. One thread unless told otherwise: other tests run beside it."""

    def __init__(self, *arguments, model=MODEL, ready=True, port=0, key="", env=None, **changes):
        port = port or free_port()
        threads = [] if "--threads" in arguments else ["--threads", 1]
        super().__init__(serve_command(TQ, model, port, "--log-format", "json", *threads, *arguments), port,
                         environment(**changes) if env is None else env, key)
        self.address = f"http://127.0.0.1:{port}/"
        if ready:
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise

    def requests_logged(self):
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == "request"]

    def wait_logged(self, wanted, count=1):
        """The lines of at least `count` requests that are `wanted`. They are written after the answer, so perhaps after the client has it."""
        deadline = time.monotonic() + 10
        while True:
            lines = [line for line in self.requests_logged() if wanted(line)]
            if len(lines) >= count:
                return lines
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(lines)} of {count} such requests were logged: {self.log()[-2000:]}")
            time.sleep(0.05)

    def request_logged(self, request_id):
        return self.wait_logged(lambda line: line["id"] == request_id)[0]

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
