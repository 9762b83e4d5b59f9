"""A server of one's own (tq serve, or a stock llama-server) and HTTP without a client library. Standard library only.

Also scripts/soak starts its server with it.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any, Mapping, Optional, Sequence, Union


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec should not


def _end_with_us() -> None:
    """In the child: the kernel ends it when the thread that started it is gone, however that happens."""
    _LIBC.prctl(1, signal.SIGTERM)


class ServerProcess:
    """Runs `command`, which listens on 127.0.0.1:`port`. Ends when its block ends, or this process."""

    def __init__(self, command: Sequence[object], port: int, env: Mapping[str, str], key: str = "", folder: str = ""):
        self.port, self.key = port, key
        self.folder = folder or tempfile.mkdtemp(prefix="tq_server_")  # ours from now on
        self.log_path = os.path.join(self.folder, "log")
        with open(self.log_path, "wb") as log:  # a session of its own: Ctrl-C is for us
            self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            env=dict(env), start_new_session=True, preexec_fn=_end_with_us)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self, seconds: float = 60) -> int:
        """Exit status after SIGTERM; -9: it had to be killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def wait_ready(self, seconds: float = 120) -> None:
        """RuntimeError: it ended before that; TimeoutError. Both with the log's end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}: {self.log()[-3000:]}")
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"the server was not ready after {seconds} s: {self.log()[-3000:]}")

    def memory(self) -> float:
        """Resident MiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as file:
            found = re.search(r"VmRSS:\s+(\d+) kB", file.read())
        assert found
        return int(found[1]) / 1024

    def ask(self, method: str, path: str, body: Union[None, str, bytes, dict[str, Any], list[Any]] = None,
            headers: Optional[Mapping[str, str]] = None, timeout: float = 60) -> tuple[int, http.client.HTTPMessage, bytes]:
        """(status, headers, body as bytes). The server's key goes along unless `headers` name another."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            sent = {} if body is None else {"Content-Type": "application/json"}
            if self.key:
                sent["Authorization"] = f"Bearer {self.key}"
            sent.update(headers or {})
            data = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path: str, headers: Optional[Mapping[str, str]] = None) -> tuple[int, bytes]:
        status, _, body = self.ask("GET", path, headers=headers)
        return status, body

    def get_json(self, path: str, headers: Optional[Mapping[str, str]] = None) -> Any:
        status, body = self.get(path, headers)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def post(self, path: str, body: Any, headers: Optional[Mapping[str, str]] = None, timeout: float = 90) -> tuple[int, Any]:
        """(status, JSON)"""
        status, _, answer = self.ask("POST", path, body, headers, timeout)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        for line in self.get("/metrics")[1].decode().splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)


def serve_command(tq: str, model: str, port: int, *arguments: object) -> list[object]:
    return [tq, "serve", "-m", model, "--host", "127.0.0.1", "--port", port, *arguments]
