"""tq serve over bare HTTP: what is wrong, what is too much, how it ends. Usage: serve_http_test.py TQ CLASS"""

import concurrent.futures
import gzip
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
import unittest

from serve_testing import MODEL, TQ, RawStream, Server, environment, main, text_of

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, "temperature": 0}
# Does not end by itself: the end of the answer is forbidden.
ENDLESS = {"messages": [{"role": "user", "content": "Count."}], "temperature": 0, "logit_bias": {"2": -100, "0": -100}}


class WithServer(unittest.TestCase):
    arguments = ["--parallel", 2, "--ctx", 1024]

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.arguments)

    @classmethod
    def tearDownClass(cls):
        cls.server.close()

    def refused(self, status, code, method, path, body=None, headers=None):
        """An error in OpenAI's shape; its headers."""
        got, answer_headers, answer = self.server.ask(method, path, body, headers)
        self.assertEqual(got, status, answer)
        error = json.loads(answer)["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertEqual(error["code"], code)
        self.assertTrue(error["message"])
        self.assertEqual(answer_headers["Content-Type"], "application/json")
        return answer_headers

    def raw(self, data, end=True):
        """The status lines of what comes back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as s:
            s.sendall(data)
            if end:
                s.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while part := s.recv(65536):
                    got += part
            except ConnectionResetError:
                pass
        return [line.decode() for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")], got


class Requests(WithServer):
    arguments = [*WithServer.arguments, "-n", 100]

    def test_token_limit(self):
        status, answer = self.server.post(CHAT, {**ENDLESS, "max_tokens": 5000})
        self.assertEqual((status, answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]), (200, 100, "length"))

    def test_bad_bodies(self):
        for body in ("", "{", "[]", "null", '{"messages":', "\0", '{"messages":[{"role":"user","content":"\udcff"}]}'.encode(
                "utf-8", "surrogateescape"), '{"a":' + "[" * 100000):
            self.refused(400, None, "POST", CHAT, body, {"Content-Type": "application/json"})
        self.refused(400, "missing_required_parameter", "POST", CHAT, {})
        self.refused(400, "invalid_type", "POST", CHAT, {**HELLO, "temperature": "hot"})
        self.refused(400, "unsupported_parameter", "POST", CHAT, {**HELLO, "n": 2})
        self.refused(400, "context_length_exceeded", "POST", "/v1/completions", {"prompt": [5] * 1024})
        for text in ("a" * (1 << 22), " " * (1 << 22), "word " * 5000, "1" * 200000):
            self.refused(400, "context_length_exceeded", "POST", "/v1/completions", {"prompt": text})
        self.refused(400, None, "POST", "/v1/completions", {"prompt": [5, 49152]})
        self.refused(400, "missing_required_parameter", "POST", "/tokenize", {})
        self.refused(400, "missing_required_parameter", "POST", "/detokenize", {"tokens": 5})
        self.assertEqual(self.server.post(CHAT, HELLO)[0], 200, "and it still answers")

    def test_content_types(self):
        self.refused(400, "bad_request", "POST", CHAT, json.dumps(HELLO), {"Content-Type": "multipart/form-data; boundary=x"})
        page = {"Origin": f"http://127.0.0.1:{self.server.port}"}
        for kind in ("text/plain", "application/x-www-form-urlencoded", "text/html"):
            self.refused(415, "unsupported_media_type", "POST", CHAT, json.dumps(HELLO), {"Content-Type": kind, **page})
            self.assertEqual(self.server.ask("POST", CHAT, json.dumps(HELLO), {"Content-Type": kind})[0], 200, "no browser: curl -d")
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.refused(413, "body_too_large", "POST", CHAT, json.dumps({**HELLO, "user": "x" * 9000}), form)
        self.refused(415, "unsupported_media_type", "POST", CHAT, gzip.compress(json.dumps(HELLO).encode()),
                     {"Content-Encoding": "gzip", "Content-Type": "application/json"})
        self.assertEqual(self.server.ask("POST", CHAT, HELLO, {"Content-Type": "Application/JSON; charset=utf-8"})[0], 200)

    def test_paths_and_methods(self):
        for path in ("/nothing", "/v1", "/v1/chat/completions/x", "/../../etc/passwd", "/%2e%2e/etc/passwd", "/v1/" + "x" * 4000):
            self.refused(404, "not_found", "GET", path)
        self.refused(404, "not_found", "POST", "/nothing", HELLO)
        self.refused(404, "model_not_found", "GET", "/v1/models/other")
        for method, path, allowed in (("GET", CHAT, "POST"), ("PUT", CHAT, "POST"), ("DELETE", "/v1/models", "GET"),
                                      ("POST", "/health", "GET"), ("PATCH", "/props", "GET"), ("GET", "/tokenize", "POST")):
            headers = self.refused(405, "method_not_allowed", method, path, {} if method != "GET" else None)
            self.assertEqual(headers["Allow"], allowed)
        self.refused(405, "method_not_allowed", "OPTIONS", CHAT)
        status, _, body = self.server.ask("HEAD", "/health")
        self.assertEqual((status, body), (200, b""))

    def test_bytes_that_are_no_http(self):
        for data in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00" * 50, b"FOO / HTTP/1.1\r\n\r\n",
                     b"GET / HTTP/1.1\r\n" + b"A" * 20000 + b"\r\n\r\n", b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n\r\n",
                     b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                     b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{}"):
            lines, _ = self.raw(data)
            self.assertTrue(all(" 4" in line[:12] for line in lines), (data[:40], lines))
        self.assertEqual(self.server.get("/health")[0], 200)
        lines, _ = self.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + b"".join(
            b"X-%d: %s\r\n" % (i, b"v" * 1000) for i in range(60)) + b"\r\n", end=False)
        self.assertIn("431", lines[0])

    def test_connections_are_kept(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        body = json.dumps(HELLO)
        sockets = set()
        for _ in range(3):
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            sockets.add(id(connection.sock))
            answer = connection.getresponse()
            self.assertEqual(answer.status, 200, answer.read())
            answer.read()
        self.assertEqual(len(sockets), 1)
        connection.close()

    def test_stream_bytes(self):
        stream = RawStream(self.server, HELLO, headers="Accept-Encoding: gzip, br\r\n")
        self.assertEqual((stream.status, stream.headers["content-type"]), (200, "text/event-stream"))
        self.assertNotIn("content-encoding", stream.headers)
        lines = list(stream.lines())
        self.assertTrue(all(line.startswith("data: ") for line in lines), lines)
        self.assertEqual(lines[-1], "data: [DONE]")
        self.assertEqual(text_of(json.loads(line[6:]) for line in lines[:-1]),
                         self.server.post(CHAT, HELLO)[1]["choices"][0]["message"]["content"])
        self.assertEqual(stream.file.read(0), b"")
        stream.close()

    def test_other_sites_may_not(self):
        for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example"):
            self.refused(403, "host_not_allowed", "GET", "/v1/models", headers={"Host": host})
            self.refused(403, "host_not_allowed", "POST", CHAT, HELLO, {"Host": host})
        for host in ("localhost", f"127.0.0.1:{self.server.port}", "[::1]:80"):
            self.assertEqual(self.server.get("/v1/models", {"Host": host})[0], 200)
        for origin in ("http://evil.example", "null"):
            self.refused(403, "origin_not_allowed", "POST", CHAT, HELLO, {"Origin": origin})
        own = f"127.0.0.1:{self.server.port}"
        status, headers, _ = self.server.ask("POST", CHAT, HELLO, {"Origin": "http://" + own, "Host": own})
        self.assertEqual(status, 200)
        self.assertNotIn("Access-Control-Allow-Origin", headers)

    def test_page(self):
        status, headers, body = self.server.ask("GET", "/")
        self.assertEqual((status, headers["Content-Type"]), (200, "text/html; charset=utf-8"))
        policy = headers["Content-Security-Policy"]
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        self.assertNotIn(b"<script>", body)

    def test_props_and_metrics(self):
        props = self.server.get_json("/props")
        self.assertEqual((props["context"]["slots"], props["context"]["per_slot"]), (2, 1024))
        self.assertEqual(props["kv"]["choice"], "tq4")
        self.assertGreater(props["kv"]["ratio"], 3)
        self.assertEqual(props["chat_template"]["kind"], "model")
        before = {name: self.server.metric(name) for name in (
            "turboquant_prompt_tokens_total", "turboquant_completion_tokens_total", "turboquant_time_to_first_token_seconds_count",
            "turboquant_inter_token_seconds_count")}
        answer = self.server.chat("Count to ten, please.", 6, cache_prompt=False)
        after = {name: self.server.metric(name) for name in before}
        self.assertEqual([after[name] - before[name] for name in before],
                         [answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"], 1,
                          answer["usage"]["completion_tokens"] - 1])
        self.assertGreater(self.server.metric("turboquant_kv_used_bytes"), 0)
        self.assertGreater(self.server.metric("turboquant_kv_f16_capacity_bytes"),
                           3 * self.server.metric("turboquant_kv_capacity_bytes"))
        self.assertEqual(self.server.metric("turboquant_slots"), 2)

    def test_log(self):
        secret = "xyzzy plugh"
        status, headers, _ = self.server.ask("POST", CHAT, {**HELLO, "messages": [{"role": "user", "content": secret}]})
        self.assertEqual(status, 200)
        line = self.server.request_logged(headers["X-Request-Id"])
        self.assertEqual((line["method"], line["path"], line["status"], line["completion_tokens"]), ("POST", CHAT, 200, 4))
        self.assertEqual(line["outcome"], "length")
        self.assertNotIn(secret, self.server.log())


class Limits(WithServer):
    arguments = ["--parallel", 1, "--queue", 1, "--ctx", 2048, "--body-limit", "64KB", "--api-key", "right",
                 "--cors-origin", "https://friend.example", "--alias", "the/model"]
    KEY = {"Authorization": "Bearer right"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server.get_json = lambda path, headers=None: json.loads(cls.server.get(path, {**cls.KEY, **(headers or {})})[1])

    def test_keys(self):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Bearer right2"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/props"), ("POST", "/tokenize")):
                got = self.refused(401, "invalid_api_key", method, path, HELLO if method == "POST" else None, headers)
                self.assertEqual(got["WWW-Authenticate"], "Bearer")
        for path in ("/health", "/"):
            self.assertEqual(self.server.get(path)[0], 200)
        self.assertEqual(self.server.post(CHAT, HELLO, self.KEY)[0], 200)
        self.assertEqual(self.server.get_json("/v1/models/the/model")["id"], "the/model")

    def test_body_limit(self):
        big = {**HELLO, "user": "x" * (64 << 10)}
        self.refused(413, "body_too_large", "POST", CHAT, big, self.KEY)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        lines, _ = self.raw(head + b"5\r\nhello\r\n", end=False)
        self.assertEqual([line.split()[1] for line in lines], ["411"], "nor can its length be hidden")
        # The rest of a body that was refused is not taken for requests.
        lines, _ = self.raw(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
                            + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", end=False)
        self.assertEqual([line.split()[1] for line in lines], ["413"])

    def test_queue(self):
        streams = [RawStream(self.server, ENDLESS, headers="Authorization: Bearer right\r\n") for _ in range(2)]
        first = streams[0].events()
        for _ in range(3):
            next(first)
        self.assertEqual(self.server.get_json("/props")["context"]["waiting"], 1)
        headers = self.refused(429, "queue_full", "POST", CHAT, HELLO, self.KEY)
        self.assertGreaterEqual(int(headers["Retry-After"]), 1)
        streams[1].close()  # one that only waits can go, too
        end = time.monotonic() + 2
        while self.server.get_json("/props")["context"]["waiting"] and time.monotonic() < end:
            time.sleep(0.02)
        self.assertEqual(self.server.get_json("/props")["context"]["waiting"], 0)
        streams[0].close()
        for _ in range(3):  # nothing of all that still counts as waiting
            self.assertEqual(self.server.post(CHAT, HELLO, self.KEY)[0], 200)

    def test_cors(self):
        friend = {"Origin": "https://friend.example"}
        status, headers, _ = self.server.ask("OPTIONS", CHAT, headers={
            **friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (204, "https://friend.example"))
        self.assertIn("x-stainless-os", headers["Access-Control-Allow-Headers"])
        status, headers, _ = self.server.ask("POST", CHAT, HELLO, {**self.KEY, **friend})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (200, "https://friend.example"))
        self.refused(403, "origin_not_allowed", "POST", CHAT, HELLO, {**self.KEY, "Origin": "https://other.example"})
        status, headers, _ = self.server.ask("OPTIONS", CHAT, headers={"Origin": "https://other.example"})
        self.assertEqual(status, 403)
        self.assertNotIn("Access-Control-Allow-Origin", headers)

    def test_slow_readers_do_not_hold_others_up(self):
        slow = RawStream(self.server, {**ENDLESS, "max_tokens": 30}, headers="Authorization: Bearer right\r\n")
        self.assertEqual(self.server.post(CHAT, HELLO, self.KEY)[0], 200)
        self.assertEqual(list(slow.events())[-1], "[DONE]")
        slow.close()


class Ends(unittest.TestCase):
    def fails(self, words, *arguments, status=1):
        command = [TQ, "serve", "--threads", 1, *([] if "-m" in arguments else ["-m", MODEL]), *arguments]
        done = subprocess.run([str(a) for a in command], env=environment(), capture_output=True, timeout=60, text=True)
        self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
        self.assertRegex(done.stderr, r"\Atq: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, done.stderr)

    def test_what_cannot_start_says_why_in_one_line(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.fails([f"port {port}", "in use", "--port"], "--port", port)
        self.fails(["--host"], "--host", "203.0.113.7", "--port", 0)
        self.fails(["no such model file"], "-m", "/nowhere.gguf")
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(b"GGUF" + b"\xff" * 5000)
            file.flush()
            self.fails([file.name], "-m", file.name)
        self.fails(["--kv-bytes", "so 0 fit"], "--kv-bytes", "1MB")
        self.fails(["--parallel 64", "--ctx"], "--parallel", 64, "--ctx", 1 << 20)
        with tempfile.NamedTemporaryFile("w") as keys:
            keys.write("key")
            keys.flush()
            os.chmod(keys.name, 0o644)
            self.fails([keys.name, "chmod 600"], "--api-key-file", keys.name)
        for wrong in (["--port", 70000], ["--parallel", 0], ["--queue", -1], ["--log-format", "xml"], ["--api-key", ""], ["--kv", "tq9"]):
            self.fails([str(wrong[1]) or "empty"], *wrong, status=2)

    def test_kv_bytes_give_the_slots(self):
        with Server("--kv-bytes", "40MB", "--ctx", 2048) as server:
            props = server.get_json("/props")
            self.assertGreaterEqual(props["context"]["slots"], 2)
            self.assertLessEqual(props["kv"]["bytes"], 40 << 20)
            self.assertGreater(props["kv"]["bytes"], 25 << 20)

    def test_prompts_are_logged_when_asked_for(self):
        with Server("--ctx", 512, "--parallel", 1, "--log-prompts") as server:
            body = {"messages": [{"role": "user", "content": "xyzzy plugh"}], "max_tokens": 1}
            status, headers, _ = server.ask("POST", CHAT, body)
            self.assertEqual(status, 200)
            self.assertIn("xyzzy plugh", server.request_logged(headers["X-Request-Id"])["prompt"])

    def test_timeout(self):
        with Server("--ctx", 8192, "--parallel", 1, "--timeout", 2) as server:
            stream = RawStream(server, ENDLESS)
            *_, last = stream.events()
            self.assertEqual(last["error"]["code"], "timeout")
            stream.close()
            status, answer = server.post(CHAT, ENDLESS)
            self.assertEqual((status, answer["error"]["code"]), (504, "timeout"))

    def test_loading_is_503(self):
        with tempfile.TemporaryDirectory() as folder:
            with Server("--ctx", 512, "--parallel", 1, ready=False, XDG_CACHE_HOME=folder) as server:  # makes its profile first
                end = time.monotonic() + 60
                while True:
                    try:
                        status, headers, body = server.ask("GET", "/health")
                        break
                    except OSError:
                        self.assertLess(time.monotonic(), end)
                        time.sleep(0.01)
                self.assertEqual((status, json.loads(body)["error"]["code"], headers["Retry-After"]), (503, "loading", "1"))
                self.assertEqual(server.post(CHAT, HELLO)[0], 503)
                self.assertEqual(server.get("/metrics")[0], 200)
                server.wait_ready()
                self.assertEqual(server.post(CHAT, HELLO)[0], 200)

    def test_measuring_the_keys_leaves_no_threads(self):
        # OpenMP's threads of the measuring, were they left, would slow every answer until the next start.
        threads = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in ("measures the keys", "finds the profile"):
                with Server("--ctx", 512, "--parallel", 1, "--threads", 2, XDG_CACHE_HOME=folder) as server:
                    self.assertEqual(server.post(CHAT, HELLO)[0], 200)
                    least = math.inf  # those that end do it by themselves, within moments
                    for _ in range(20):
                        time.sleep(0.1)
                        least = min(least, len(os.listdir(f"/proc/{server.process.pid}/task")))
                    threads.append(least)
                    self.assertEqual("keys measured" in server.log(), len(threads) == 1)
        self.assertEqual(threads[0], threads[1])

    def test_sigterm_finishes_what_is_running(self):
        with Server("--ctx", 1024, "--parallel", 1) as server:
            stream = RawStream(server, {**ENDLESS, "max_tokens": 200})
            events = stream.events()
            for _ in range(3):
                next(events)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(server.post, CHAT, HELLO)
                while not server.get_json("/props")["context"]["waiting"]:
                    time.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                status, answer = server.post(CHAT, HELLO)
                self.assertEqual((status, answer["error"]["code"]), (503, "shutting_down"))
                rest = list(events)
                self.assertEqual(rest[-1], "[DONE]")
                self.assertEqual(rest[-2]["choices"][0]["finish_reason"], "length")
                self.assertEqual(waiting.result()[0], 200, "what waited in the queue is answered too")
            stream.close()
            self.assertEqual(server.process.wait(10), 0)

    def test_the_drain_has_a_limit(self):
        with Server("--ctx", 4096, "--parallel", 1, "--drain", 1) as server:
            stream = RawStream(server, {**ENDLESS, "max_tokens": 4000})
            events = stream.events()
            next(events)
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            last = list(events)[-1]
            self.assertEqual(last["error"]["code"], "shutting_down")
            self.assertEqual(server.process.wait(10), 0)
            self.assertLess(time.monotonic() - start, 4)
            stream.close()

    def test_a_second_ctrl_c_ends_at_once(self):
        with Server("--ctx", 4096, "--parallel", 1) as server:
            stream = RawStream(server, {**ENDLESS, "max_tokens": 4000})
            next(stream.events())
            for _ in range(2):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            self.assertEqual(server.process.wait(2), 130)
            stream.close()


if __name__ == "__main__":
    main(globals())
