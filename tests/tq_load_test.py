"""Sessions of tq serve across restarts, tq bench serve, a short scripts/soak. Usage: tq_load_test.py TQ GROUP

Needs TQ_TEST_SMOLLM2; a group that lacks it prints "SKIPPED: " and succeeds. Standard library only.
"""

import csv
import io
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import tempfile
import time

import tq_program_test as program
from serve_testing import Server
from tq_program_test import Case, environment, flip, session_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = os.environ.get("TQ_TEST_SMOLLM2", "")
STORY = ("The lighthouse stood at the end of a long spit of gravel, and in winter the road to it was under water twice a day. Martha had "
         "kept the lamp for eleven years. She knew the sound each wind made in the gallery rails, and she could tell from the kitchen "
         "whether the glass needed cleaning. When the harbour board wrote that the light would be run by a machine, she read the letter "
         "twice, put it under the clock, and went up to trim the wick as she did every evening. ")


def start_server(*arguments, slots=1, kv="tq4"):
    return Server("--kv", kv, "--parallel", slots, "--ctx", 2048, "--threads", 2, *arguments, env=environment())


def ask(server, messages, n=12):
    """The answer's text and how many tokens of the prompt, how many of them cached."""
    answer = server.chat(messages, n)
    usage = answer["usage"]
    return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


class Restart(Case):
    """tq serve --session-dir."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="tq_restart_")
        self.addCleanup(folder.cleanup)
        self.sessions = os.path.join(folder.name, "sessions")
        self.question = [user(STORY * 4 + " What does Martha keep?")]

    def start(self, *arguments, **how):
        server = start_server("--session-dir", self.sessions, *arguments, **how)
        self.addCleanup(server.close)
        return server

    def files(self):
        return sorted(pathlib.Path(self.sessions).glob("*.tqs"))

    def later(self, answer):
        return [*self.question, assistant(answer), user("And for how long?")]

    def saved(self):
        """A conversation's file, as a server that ended left it; its answer."""
        server = self.start()
        answer, read, _ = ask(server, self.question)
        self.assertGreater(read, 300)
        self.assertEqual(server.stop(), 0, server.log()[-2000:])
        self.assertEqual(len(self.files()), 1, os.listdir(self.sessions))
        return answer, self.files()[0]

    def test_goes_on_as_if_nothing_had_happened(self):
        straight = start_server()
        self.addCleanup(straight.close)
        answer, read, _ = ask(straight, self.question)
        expected, _, cached = ask(straight, self.later(answer))
        self.assertGreater(cached, read - 8)
        straight.stop()

        same, path = self.saved()
        self.assertEqual(same, answer)
        self.assertEqual(stat.S_IMODE(os.stat(self.sessions).st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
        self.assertRegex(path.name, r"\A[0-9a-f]{32}\.tqs\Z")
        head, tokens, _ = session_file(path)
        self.assertEqual(head["note"], "")
        self.assertNotIn(b"Martha", path.read_bytes())  # tokens, no text
        f16 = tokens * 30 * 2 * 3 * 64 * 2
        self.assertLess(path.stat().st_size, (0.30 + 36 / tokens) * f16)

        server = self.start()
        text, _, again = ask(server, self.later(answer))
        self.assertEqual(again, cached, server.log()[-2000:])
        self.assertEqual(text, expected)
        # The longer conversation takes its file's place.
        server.stop()
        self.assertEqual(len(self.files()), 1)
        self.assertGreater(session_file(self.files()[0])[1], tokens)

    def test_what_a_slot_gives_up_is_found_again(self):
        server = self.start(slots=1)
        answer, read, _ = ask(server, self.question)
        ask(server, [user("What is the capital of France? " * 30)])
        _, _, cached = ask(server, self.later(answer))
        self.assertGreater(cached, read - 8, server.log()[-2000:])

    def test_idle_slots_are_saved_and_survive_a_crash(self):
        server = self.start()
        answer, read, _ = ask(server, self.question)
        end = time.monotonic() + 30
        while not self.files() and time.monotonic() < end:
            time.sleep(0.1)
        server.kill()
        _, _, cached = ask(self.start(), self.later(answer))
        self.assertGreater(cached, read - 8)

    def refused(self, path, words, **how):
        """The file is named once, with why, and the prompt is read again."""
        server = self.start(**how)
        text, _, cached = ask(server, self.question)
        self.assertEqual(cached, 0, server.log()[-2000:])
        self.assertNotEqual(text, "")
        lines = [line for line in server.log().splitlines() if path.name in line]
        self.assertEqual(len(lines), 1, server.log()[-2000:])
        self.assertIn(words, lines[0])
        self.assertEqual(server.stop(), 0)

    def test_damaged_files_are_named_and_read_again(self):
        _, path = self.saved()
        good = path.read_bytes()
        packed = session_file(path)[2]
        # tq_session_test has every byte and every length.
        for offset, words in [(3, "not a file that tq saved"), (packed - 2, "damaged (checksum)"), (packed + 1000, "damaged (checksum)")]:
            for other in self.files():
                other.unlink()
            path.write_bytes(good)
            flip(path, offset)
            with self.subTest(offset=offset):
                self.refused(path, words)
        for size in (0, packed + 5):
            for other in self.files():
                other.unlink()
            path.write_bytes(good[:size])
            with self.subTest(size=size):
                self.refused(path, "not a file" if size == 0 else "cut short")

    def test_another_cache_is_named_and_left(self):
        _, path = self.saved()
        self.refused(path, "another cache, 4/4 bits", kv="tq5")
        self.assertTrue(path.exists())

    def test_the_limit_is_kept(self):
        _, path = self.saved()
        limit = path.stat().st_size * 5 // 2
        server = self.start("--session-dir-limit", limit)
        for topic in ("horses", "bread", "rivers"):
            ask(server, [user(f"About {topic}. " + STORY * 4)])
        server.stop()
        self.assertLessEqual(sum(p.stat().st_size for p in self.files()), limit)
        self.assertEqual(len(self.files()), 2)
        self.assertFalse(path.exists(), "the oldest goes first")

    def test_a_folder_that_others_can_read_is_refused(self):
        os.makedirs(self.sessions, 0o755)
        self.fails(1, "chmod 700", "serve", "-m", MODEL, "--port", 0, "--session-dir", self.sessions)


class BenchServe(Case):
    FLAGS = ["bench", "serve", "--rounds", 1, "--threads", 1]  # other tests run beside it

    def test_load_prefix_and_stall(self):
        done = self.succeeds(*self.FLAGS, "--kv", "tq4", "--tests", "throughput,prefix,stall", "--clients", "1,3", "--requests", 1,
                             "--prompt-tokens", 24, "--answer-tokens", 8, "--prefix-tokens", 384, "--long-tokens", 512, "-o", "json")
        rows = json.loads(done.out)
        self.assertEqual([(row["test"], row["engine"], row["kv"]) for row in rows],
                         [(test, "tq serve", "tq4") for test in ("throughput", "throughput", "prefix", "stall")])
        one, three, prefix, stall = rows
        self.assertEqual((one["clients"], three["clients"]), (1, 3))
        for row in (one, three):
            self.assertGreater(row["tok_s"], 0)
            self.assertLessEqual(row["first_token_p50_ms"], row["first_token_max_ms"])
            self.assertLessEqual(row["between_tokens_p95_ms"], row["between_tokens_p99_ms"])
            self.assertAlmostEqual(row["prompt_tokens"], 24, delta=12)
            self.assertLessEqual(row["answer_tokens"], 8)
        self.assertAlmostEqual(three["x_of_one"], three["tok_s"] / one["tok_s"], places=3)
        self.assertGreater(prefix["cached_tokens"], 300)
        self.assertAlmostEqual(prefix["prompt_tokens"], 384, delta=40)
        self.assertLess(prefix["cached_ms"], prefix["uncached_ms"])
        self.assertGreaterEqual(stall["stall_ms"], stall["between_tokens_p50_ms"])
        self.assertGreater(stall["read_ms"], stall["stall_ms"])

    def test_memory(self):
        rows = json.loads(self.succeeds(*self.FLAGS, "--tests", "memory", "--long-tokens", 512, "--memory", 60, "--check", 2, "-o",
                                        "json").out)
        f16, tq4 = rows
        self.assertEqual((f16["kv"], tq4["kv"]), ("f16", "tq4"))
        self.assertEqual(f16["conversations"], 60 * 1024 * 1024 // (512 * 30 * 2 * 3 * 64 * 2))
        self.assertGreater(tq4["conversations"], 2.5 * f16["conversations"])
        for row in rows:
            self.assertLessEqual(row["kv_bytes"], row["memory_bytes"])
            self.assertEqual((row["checked"], row["held"]), (2, 2))

    def test_tables_and_csv(self):
        small = [*self.FLAGS, "--kv", "tq4", "--tests", "throughput,prefix", "--clients", "2", "--requests", 1, "--prompt-tokens", 16,
                 "--answer-tokens", 4, "--prefix-tokens", 128]
        out = self.succeeds(*small).out
        self.assertEqual(len(re.findall(r"(?m)^\| engine", out)), 2, out)
        rows = list(csv.DictReader(io.StringIO(self.succeeds(*small, "-o", "csv").out)))
        self.assertEqual([row["test"] for row in rows], ["throughput", "prefix"])

    def test_errors(self):
        self.fails(2, "--tests nonsense", *self.FLAGS, "--tests", "nonsense")
        self.fails(2, "--clients", *self.FLAGS, "--clients", "0")
        self.fails(2, "--url", *self.FLAGS, "--url", "http://127.0.0.1:1", "-m", MODEL)
        self.fails(2, "tq9", *self.FLAGS, "--kv", "tq9")
        done = program.tq(*self.FLAGS, "--url", "http://127.0.0.1:1", "--tests", "prefix")
        self.assertEqual(done.returncode, 1)
        self.assertIn("no server answers there", done.err)
        done = program.tq(*self.FLAGS, "--kv", "", "--llama-server", "/bin/false", "--tests", "prefix")
        self.assertEqual(done.returncode, 1)
        self.assertIn("ended before it was ready", done.err)


class Soak(Case):
    def test_three_hundred(self):
        done = subprocess.run([sys.executable, ROOT / "scripts/soak", "--tq", program.TQ, "-m", MODEL, "--requests", "300", "--clients",
                               "6", "--threads", "2", "--growth", "25", "--session-dir", os.path.join(program.WORK, "soak")],
                              capture_output=True, text=True, timeout=460, env=environment(), check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("soak: passed: 0 wrong, 0 lost", done.stdout)
        counts = {name: int(n) for n, name in re.findall(r"(?m)^ +(\d+) (.*)$", done.stdout)}
        self.assertGreater(counts["answered right"], 150)
        self.assertGreater(counts["refused as expected"], 15)
        self.assertGreater(counts["hung up"], 15)


def make_profile():
    program.tq("tune", MODEL, "--tokens", 256, "--threads", 2).check_returncode()  # or the first server would do it


if __name__ == "__main__":
    program.run_group((Restart, BenchServe, Soak), before=make_profile)
