"""tq eval and scripts/plot-kld as their users run them. Usage: tq_eval_test.py TQ GROUP

Needs TQ_TEST_SMOLLM2 (and TQ_TEST_PYTHON, which has gguf, for --f32-weights). Standard library only.
"""

import csv
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

import tq_program_test as program
from tq_program_test import MODEL, Case, cache_folder, tq

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = ROOT / "docs" / "format.md"
# Keys are conditioned the same way in every run, and nothing is measured first.
COMMON = ["--threads", "1", "--no-profile"]
SHORT = ["--ctx", "256", "--chunks", "1", "--file", TEXT, *COMMON]
KEYS = ["model", "kv", "bits_per_value", "bytes_per_token", "positions", "kld_mean", "kld_se", "kld_median", "kld_p99",
        "kld_max", "top1", "ppl", "ppl_base", "threads", "ctx"]


def bases(cache):
    return sorted(pathlib.Path(cache).glob("turboquant/eval/base-*"))


class Kld(Case):
    """One measurement with F32 weights, so that the floor is that of the cache."""

    def test_fewer_bits_are_farther_off_and_the_base_is_kept(self):
        cache = cache_folder("kld")
        flags = ["eval", "kld", MODEL, *SHORT, "--f32-weights", "-o", "json"]
        first = self.succeeds(*flags, "--kv", "8/8:w0,4/4:w0,2/2:w0,4/4:w64,q8_0,f16", XDG_CACHE_HOME=cache)
        rows = json.loads(first.out)
        self.assertEqual([row["kv"] for row in rows],
                         ["16/16", "8/8:w0", "4/4:w0", "2/2:w0", "4/4:w64", "q8_0", "f16"])
        for row in rows:
            for key in KEYS:
                self.assertIn(key, row)
            self.assertEqual((row["positions"], row["ctx"], row["threads"]), (127, 256, 1))
            self.assertIsNone(row["kld_se"])  # one chunk says nothing about the spread of chunks
            self.assertLessEqual(row["kld_median"], row["kld_p99"])
            self.assertLessEqual(row["kld_p99"], row["kld_max"])
        floor, eight, four, two, window, q8_0, f16 = [row["kld_mean"] for row in rows]
        self.assertLess(abs(f16), 1e-5)
        self.assertLess(floor, 1e-5)
        self.assertLess(floor, eight)
        self.assertLess(eight, four / 4)
        self.assertLess(four, two / 4)
        self.assertLess(window, four / 2)
        self.assertLess(q8_0, four / 4)
        self.assertGreater(rows[1]["top1"], rows[3]["top1"])
        self.assertAlmostEqual(rows[0]["ppl"], rows[0]["ppl_base"], delta=0.01 * rows[0]["ppl"])
        self.assertGreater(rows[3]["ppl"], 1.05 * rows[3]["ppl_base"]) # of 127 positions: 1.15 on one processor, above 1.2 on another
        self.assertEqual([row["bits_per_value"] for row in rows], [16, 8.25, 4.25, 2.25, 4.25, 8.5, 16])
        self.assertGreater(rows[4]["exact_bytes"], rows[2]["exact_bytes"])
        self.assertIn("base (f16)", first.err)

        again = self.succeeds(*flags, "--kv", "4/4:w0", XDG_CACHE_HOME=cache)
        self.assertNotIn("base (f16)", again.err)
        self.assertEqual(json.loads(again.out)[1], rows[2])
        # Other positions are another base.
        self.assertEqual(len(bases(cache)), 1)
        self.succeeds(*flags, "--stride", "16", "--kv", "f16", XDG_CACHE_HOME=cache)
        self.assertEqual(len(bases(cache)), 2)

    def test_a_damaged_base_is_made_again(self):
        cache = cache_folder("damaged")
        flags = ["eval", "kld", "-m", MODEL, *SHORT, "--kv", "4/4:w0", "-o", "csv"]
        first = self.succeeds(*flags, XDG_CACHE_HOME=cache)
        (base,) = bases(cache)
        whole = base.read_bytes()
        base.write_bytes(whole[:len(whole) // 2])
        second = self.succeeds(*flags, XDG_CACHE_HOME=cache)
        self.assertRegex(second.err, r"damaged, made again")
        self.assertEqual(second.out, first.out)
        self.assertEqual(base.read_bytes(), whole)

        rows = list(csv.DictReader(io.StringIO(first.out)))
        self.assertEqual([row["kv"] for row in rows], ["16/16", "4/4:w0"])
        for key in KEYS:
            self.assertIn(key, rows[0])
        self.assertEqual(rows[0]["kld_se"], "")
        self.plot(first.out)

    def plot(self, text):
        with tempfile.TemporaryDirectory() as folder:
            data, picture = pathlib.Path(folder, "kld.csv"), pathlib.Path(folder, "kld.svg")
            data.write_text(text, encoding="utf-8")
            subprocess.run([sys.executable, ROOT / "scripts/plot-kld", data, "-o", picture], check=True,
                           stdout=subprocess.DEVNULL)
            words = [element.text for element in ElementTree.parse(picture).iter() if element.tag.endswith("text")]
            self.assertIn("4/4:w0", words)
            self.assertIn("floor", words)
            data.write_text("model,kv\na,b\n", encoding="utf-8")
            done = subprocess.run([sys.executable, ROOT / "scripts/plot-kld", data, "-o", picture], check=False,
                                  capture_output=True, text=True)
            self.assertNotEqual(done.returncode, 0)
            self.assertRegex(done.stderr, r"\Aplot-kld: error: [^\n]+\n\Z")


class Ppl(Case):
    def test_perplexity_of_code(self):
        done = self.succeeds("eval", "ppl", "-m", MODEL, "--ctx", "256", "--chunks", "2", "--text", "code", *COMMON,
                             "--kv", "f16,2/2:w0", "-o", "json")
        f16, two = json.loads(done.out)
        self.assertEqual((f16["kv"], f16["positions"], f16["text"]), ("f16", 254, "code"))
        self.assertTrue(1 < f16["ppl"] < 30, f16)
        self.assertGreater(two["ppl"], 1.1 * f16["ppl"])
        self.assertTrue(f16["ppl_se"] > 0 and math.isfinite(f16["ppl_se"]))
        self.assertNotIn("kld_mean", f16)
        table = self.succeeds("eval", "ppl", "-m", MODEL, *SHORT, "--kv", "f16").out
        self.assertRegex(table, r"(?m)^\| f16 \| 16\.00 \| 23040 \| - \| [\d.]+ \|$")


class Niah(Case):
    def test_a_needle_in_a_short_text(self):
        picture = os.path.join(program.WORK, "niah.svg")
        done = self.succeeds("eval", "niah", "-m", MODEL, "--file", TEXT, *COMMON, "--lengths", "384", "--depths", "1",
                             "--variant", "single", "--kv", "8/8", "--plot", picture, "-o", "json")
        rows = json.loads(done.out)
        self.assertEqual([row["kv"] for row in rows], ["f16", "8/8"])
        for row in rows:
            self.assertEqual((row["length"], row["depth"], row["asked"], row["variant"]), (384, 0.5, 1, "single"))
        self.assertEqual([(row["found"], row["exact"], row["digit_accuracy"]) for row in rows], [(1, 1, 1)] * 2)
        words = [element.text for element in ElementTree.parse(picture).iter() if element.tag.endswith("text")]
        for word in ["f16", "8/8", "384", "50 %", "100"]:
            self.assertIn(word, words)

    def test_several_needles(self):
        done = self.succeeds("eval", "niah", "-m", MODEL, "--file", TEXT, *COMMON, "--lengths", "400,512", "--depths",
                             "3", "--kv", "2/2:w0:s0", "-o", "csv")
        rows = list(csv.DictReader(io.StringIO(done.out)))
        self.assertEqual([(row["kv"], row["length"], row["depth"]) for row in rows],
                         [(kv, length, depth) for kv in ("f16", "2/2:w0:s0") for length in ("400", "512")
                          for depth in ("0.0", "0.5", "1.0")])
        found = [sum(int(row["found"]) for row in half) for half in (rows[:6], rows[6:])]
        digits = [sum(float(row["digit_accuracy"]) for row in half) / 6 for half in (rows[:6], rows[6:])]
        self.assertGreaterEqual(found[0], 4)
        self.assertLess(found[1], found[0])
        self.assertLess(digits[1], digits[0] - 0.1)
        table = self.succeeds("eval", "niah", "-m", MODEL, "--file", TEXT, *COMMON, "--lengths", "400", "--depths", "3",
                              "--variant", "multivalue", "--kv", "f16").out
        self.assertRegex(table, r"(?m)^\| f16 \| 16\.00 \| \d/3 \(\d+\.\d %\) \| \d/3 \(\d+\.\d %\) \|$")


class EvalErrors(Case):
    def test_wrong_words(self):
        kld = ["eval", "kld", "-m", MODEL]
        for words, flags in [("tq9", ["--kv", "tq9"]), (":wN", ["--kv", "tq4:x"]), ("--window", ["--kv", "q8_0:w3"]),
                             ("-o", ["-o", "xml"]), ("--text", ["--text", "poem"]), ("--chunks", ["--chunks", "0"]),
                             ("--stride", ["--stride", "0"]), ("--threads", ["--threads", "-1"]),
                             ("leave one", ["--text", "code", "--file", "x"]), ("trained for 8192", ["--ctx", "8193"]),
                             ("tokens", ["--file", TEXT, "--chunks", "1000", "--ctx", "8192"]),
                             ("at least", ["--file", TEXT, "--ctx", "8"])]:
            with self.subTest(flags=flags):
                self.fails(2, words, *kld, *flags)
        self.fails(2, "eval kld", "eval", "kld", "--nope")
        self.fails(2, "--variant", "eval", "niah", "-m", MODEL, "--variant", "x")
        self.fails(2, "--depths", "eval", "niah", "-m", MODEL, "--depths", "65")
        self.fails(2, "trained for", "eval", "niah", "-m", MODEL, "--lengths", "9000")
        self.fails(2, "needles", "eval", "niah", "-m", MODEL, "--lengths", "100", "--file", TEXT, "--kv", "f16")
        self.fails(2, "tokens", "eval", "niah", "-m", MODEL, "--lengths", "8192", "--depths", "1", "--kv", "f16",
                   "--file", os.path.join(ROOT, "LICENSE"))

    def test_missing_things(self):
        self.fails(1, "no such model", "eval", "kld", "-m", "/nonexistent.gguf")
        self.fails(1, "cannot be read", "eval", "kld", "-m", MODEL, "--file", "/nonexistent.txt")
        self.fails(1, "cannot be read", "eval", "kld", "-m", MODEL, "--file", program.WORK)
        self.fails(1, "TQ_PYTHON", "eval", "kld", "-m", MODEL, "--text", "code", TQ_PYTHON="/nonexistent/python")
        # A Python without its site-packages has no gguf.
        bare = os.path.join(program.WORK, "python")
        pathlib.Path(bare).write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
        os.chmod(bare, 0o755)
        self.fails(1, ["--f32-weights", "TQ_PYTHON"], "eval", "kld", "-m", MODEL, "--f32-weights", TQ_PYTHON=bare,
                   XDG_CACHE_HOME=cache_folder("bare"))

    def test_ctrl_c(self):
        cache = cache_folder("interrupted")
        environment = program.environment(XDG_CACHE_HOME=cache)
        process = subprocess.Popen([program.TQ, "eval", "kld", "-m", MODEL, "--file", ROOT / "docs" / "format.md", "--ctx",
                                    "1024", "--chunks", "2", *COMMON], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=environment)
        deadline = time.monotonic() + 100
        while not list(pathlib.Path(cache).glob("turboquant/eval/*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
        self.assertEqual(process.returncode, 1, err)
        self.assertEqual(out, b"")
        self.assertRegex(err.decode(), r"\Atq: stopped by Ctrl-C\n\Z")
        self.assertEqual(list(pathlib.Path(cache).glob("turboquant/eval/*")), [])


if __name__ == "__main__":
    program.run_group((Kld, Ppl, Niah, EvalErrors))
