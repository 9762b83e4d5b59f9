"""tq tune and the profiles that other commands find. Usage: tq_tune_test.py TQ GROUP

Needs TQ_TEST_SMOLLM2, for some tests TQ_TEST_TINY (the folder that tests/models/make_models.py writes). Standard library
only; the profile file is read here by its description in docs/format.md.
"""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib

import tq_program_test as program
from tq_program_test import LIKELIEST, MODEL, Case, cache_folder, tq

TINY = os.environ.get("TQ_TEST_TINY", "")
# One thread: other tests run beside these.
TUNE = ["tune", "--threads", 1]


def profiles(cache):
    return sorted(pathlib.Path(cache).glob("turboquant/profiles/*"))


def tiny(name):
    path = os.path.join(TINY, name + ".gguf")
    if not os.path.isfile(path):
        raise unittest.SkipTest(f"no {path}")
    return path


def read_profile(path):
    """The file's fields, with its checksum checked."""
    data = pathlib.Path(path).read_bytes()
    magic, version, n_layers, checksum, bits = struct.unpack_from("<4sIIId", data)
    assert (magic, version) == (b"TQPF", 1)
    assert zlib.crc32(data[:12] + data[16:]) == checksum
    at = 24
    texts = []
    for _ in range(2):
        (length,) = struct.unpack_from("<I", data, at)
        texts.append(data[at + 4:at + 4 + length].decode())
        at += 4 + length
    layers = []
    for _ in range(n_layers):
        layer, size, heads, key_bits, value_bits, _, length = struct.unpack_from("<IHHBBHI", data, at)
        record = data[at + 16:at + 16 + length]
        rmagic, rversion, flags, rsize, rheads, pairs, rchecksum = struct.unpack_from("<4sBBHHHI", record)
        assert (rmagic, rversion, rsize, rheads) == (b"TQKC", 1, size, heads)
        assert zlib.crc32(record[:12] + record[16:]) == rchecksum
        n = size * heads
        assert len(record) == 16 + 2 * n * bin(flags).count("1") + 8 * pairs
        layers.append({"layer": layer, "size": size, "heads": heads, "bits": (key_bits, value_bits), "pairs": pairs,
                       "mu": struct.unpack_from(f"<{n}e", record, 16) if flags & 1 else (),
                       "lambda": struct.unpack_from(f"<{n}e", record, 16 + 2 * n) if flags & 2 else ()})
        at += 16 + length
    assert at == len(data)
    return {"model": texts[0], "text": texts[1], "bits": bits, "layers": layers}


class Tune(Case):
    def test_writes_every_layer(self):
        cache = cache_folder("layers")
        done = self.succeeds(*TUNE, MODEL, "--tokens", 512, XDG_CACHE_HOME=cache)
        self.assertIn("30 layers, 512 tokens of built-in text", done.out)
        self.assertEqual(done.err, "")
        (path,) = profiles(cache)
        self.assertIn(str(path), done.out)
        profile = read_profile(path)
        self.assertIn("135M", profile["model"])
        self.assertEqual(profile["text"], "built-in text, 512 tokens")
        self.assertEqual(profile["bits"], 0)
        self.assertEqual([layer["layer"] for layer in profile["layers"]], list(range(30)))
        for layer in profile["layers"]:
            self.assertEqual((layer["size"], layer["heads"], layer["pairs"]), (64, 3, 32))
            self.assertGreater(max(map(abs, layer["mu"])), 0.1)
            self.assertGreater(max(layer["lambda"]), 1.1)
            self.assertLess(min(layer["lambda"]), 0.9)

    def test_a_text_of_ones_own_and_another_place(self):
        text = os.path.join(program.WORK, "own.txt")
        path = os.path.join(program.WORK, "own.tqp")
        pathlib.Path(text).write_text("The harbour was quiet, and the gulls slept on the roofs of the sheds. " * 40)
        cache = cache_folder("own")
        result = json.loads(self.succeeds(*TUNE, tiny("gemma3"), "--file", text, "--tokens", 300, "--output", path, "--json",
                                          XDG_CACHE_HOME=cache).out)
        self.assertEqual(result["profile"], path)
        self.assertEqual(result["tokens"], 300)
        self.assertEqual(len(result["layers"]), 6)
        self.assertEqual(profiles(cache), [])
        self.assertEqual(read_profile(path)["text"], f"{text}, 300 tokens")

    def test_what_cannot_be(self):
        text = os.path.join(program.WORK, "short.txt")
        pathlib.Path(text).write_text("Much too short.")
        model = tiny("llama_64")
        self.fails(1, [text, "256 or more"], "tune", model, "--file", text)
        self.fails(1, "/no/such/text", "tune", model, "--file", "/no/such/text")
        self.fails(1, program.WORK, "tune", model, "--file", program.WORK)
        self.fails(1, "/no/such/folder/x.tqp", "tune", model, "--output", "/no/such/folder/x.tqp")
        self.fails(1, "no such model file", "tune", "/no/such.gguf")
        self.fails(1, ["mamba.gguf", "no KV cache"], "tune", tiny("mamba"))
        for flag, value in [("--tokens", "5"), ("--tokens", "x"), ("--budget", "1.9"), ("--budget", "8.1"), ("--budget", "nan"),
                            ("--threads", "-1")]:
            self.fails(2, flag, "tune", model, flag, value)

    def test_stopped(self):
        cache = cache_folder("stopped")
        child = subprocess.Popen([program.TQ, "tune", MODEL, "--threads", "1"], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env=program.environment(XDG_CACHE_HOME=cache))
        try:
            child.wait(2)
        except subprocess.TimeoutExpired:
            pass
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=100)
        self.assertEqual(child.returncode, 1)
        self.assertEqual(err, b"tq: stopped by Ctrl-C\n")
        self.assertEqual(profiles(cache), [])


class Profile(Case):
    """What run, info and eval do about profiles."""

    def test_the_first_load_makes_one_and_later_ones_find_it(self):
        cache = cache_folder("first")
        model = tiny("gemma3")
        # So coarse that it shows whether the profile was used.
        run = ["run", *LIKELIEST, "-m", model, "--ctx", 512, "-n", 60, "-p", "hello", "--kv", "2/2", "--window", 0]
        done = self.succeeds(*run, XDG_CACHE_HOME=cache)
        (path,) = profiles(cache)
        self.assertRegex(done.err, r"\Afirst load of gemma3.gguf: keys measured on [\d,]+ tokens in [\d.]+ s; profile "
                         + str(path) + r"\n[^\n]*\n\Z")
        before = path.read_bytes()
        again = self.succeeds(*run, XDG_CACHE_HOME=cache)
        self.assertNotIn("first load", again.err)
        self.assertEqual(again.out, done.out)
        self.assertEqual(path.read_bytes(), before)
        self.assertEqual(profiles(cache), [path])
        self.succeeds(*run[:-4], "--no-turboquant", XDG_CACHE_HOME=cache_folder("none"))
        self.succeeds(*run[:-4], "--kv", "16/16", XDG_CACHE_HOME=cache_folder("none"))
        without = self.succeeds(*run, "--no-profile", XDG_CACHE_HOME=cache_folder("none"))
        self.assertNotEqual(without.out, done.out)
        self.assertEqual(profiles(cache_folder("none")), [])

    def test_eval_uses_it(self):
        cache = cache_folder("eval")
        model = tiny("gemma3")
        self.succeeds(*TUNE, model, XDG_CACHE_HOME=cache)
        (path,) = profiles(cache)
        text = os.path.join(program.WORK, "eval.txt")
        pathlib.Path(text).write_text("The harbour was quiet, and the gulls slept on the roofs of the sheds. " * 100)
        kld = ["eval", "kld", model, "--threads", 1, "--kv", "4/4:w0", "--file", text, "--ctx", 256, "--chunks", 1, "-o", "json"]
        done = self.succeeds(*kld, XDG_CACHE_HOME=cache)
        self.assertIn(f"keys are conditioned by {path} (built-in text", done.err)
        with_profile = json.loads(done.out)[-1]["kld_mean"]
        other = json.loads(self.succeeds(*kld, "--no-profile", XDG_CACHE_HOME=cache, TURBOQUANT_CALIBRATE="off").out)
        self.assertNotEqual(other[-1]["kld_mean"], with_profile)

    def test_named_ones(self):
        cache = cache_folder("named")
        mine = os.path.join(program.WORK, "mine.tqp")
        model = tiny("gemma3")
        self.succeeds(*TUNE, model, "--output", mine, XDG_CACHE_HOME=cache)
        run = ["run", *LIKELIEST, "-m", model, "--ctx", 512, "-n", 1, "-p", "hello"]
        for how in [{"TURBOQUANT_PROFILE": mine}, {}]:
            flags = [] if how else ["--profile", mine]
            done = self.succeeds(*run, *flags, XDG_CACHE_HOME=cache, **how)
            self.assertNotIn("first load", done.err)
            self.assertEqual(profiles(cache), [])
        self.fails(2, "--no-profile", *run, "--profile", mine, "--no-profile", XDG_CACHE_HOME=cache)
        self.fails(1, ["/no/such.tqp", "tq tune"], *run, "--profile", "/no/such.tqp", XDG_CACHE_HOME=cache)
        self.fails(1, [mine, "of another model", "tq tune"], "run", "-m", tiny("llama_64"), "-p", "x", "--profile", mine,
                   XDG_CACHE_HOME=cache)
        self.fails(1, [mine, "of another model"], "run", "-m", tiny("deci"), "-p", "x", XDG_CACHE_HOME=cache,
                   TURBOQUANT_PROFILE=mine)
        self.succeeds(*TUNE, tiny("llama_64"), "--output", mine, XDG_CACHE_HOME=cache)
        self.fails(1, [mine, "its layer 0 is not the model's"], "run", "-m", tiny("llama_80"), "-p", "x", "--profile", mine,
                   XDG_CACHE_HOME=cache)
        self.succeeds(*TUNE, model, "--output", mine, XDG_CACHE_HOME=cache)
        damaged = os.path.join(program.WORK, "damaged.tqp")
        data = bytearray(pathlib.Path(mine).read_bytes())
        data[len(data) // 2] ^= 1
        pathlib.Path(damaged).write_bytes(data)
        self.fails(1, [damaged, "damaged", "tq tune"], *run, "--profile", damaged, XDG_CACHE_HOME=cache)

    def test_a_damaged_one_in_the_cache_folder_is_made_anew(self):
        cache = cache_folder("damaged")
        model = tiny("llama_64")
        self.succeeds(*TUNE, model, XDG_CACHE_HOME=cache)
        (path,) = profiles(cache)
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        done = self.succeeds("run", *LIKELIEST, "-m", model, "--ctx", 512, "-n", 1, "-p", "hello", XDG_CACHE_HOME=cache)
        self.assertIn("damaged", done.err)
        self.assertIn("first load", done.err)
        self.assertEqual(read_profile(path)["layers"], read_profile(self.written(path, good))["layers"])

    def written(self, path, data):
        copy = os.path.join(program.WORK, path.name)
        pathlib.Path(copy).write_bytes(data)
        return copy

    def test_a_changed_model_has_another(self):
        cache = cache_folder("changed")
        one = os.path.join(program.WORK, "one.gguf")
        shutil.copy(tiny("llama_64"), one)
        run = ["run", *LIKELIEST, "--ctx", 512, "-n", 1, "-p", "hello", "-m"]
        self.succeeds(*run, one, XDG_CACHE_HOME=cache)
        copy = os.path.join(program.WORK, "copy.gguf")
        shutil.copy(one, copy)  # another name and time, the same contents
        self.assertNotIn("first load", self.succeeds(*run, copy, XDG_CACHE_HOME=cache).err)
        with open(copy, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        self.assertIn("first load", self.succeeds(*run, copy, XDG_CACHE_HOME=cache).err)
        self.assertEqual(len(profiles(cache)), 2)

    def test_a_cache_folder_that_cannot_be_written(self):
        blocked = os.path.join(program.WORK, "blocked")
        pathlib.Path(blocked).write_text("a file where a folder should be")
        temporary = cache_folder("temporary")
        done = self.succeeds("run", *LIKELIEST, "-m", tiny("llama_64"), "--ctx", 512, "-n", 1, "-p", "hello",
                             XDG_CACHE_HOME=blocked, TMPDIR=temporary)
        self.assertRegex(done.err, r"\Afirst load of [^\n]*; the profile is not kept: [^\n]*blocked[^\n]*\n[^\n]*\n\Z")
        self.assertEqual(os.listdir(temporary), [])


class Budget(Case):
    """Bits for each layer, and --kv auto."""

    def test_the_budget_is_met_and_used(self):
        cache = cache_folder("budget")
        model = tiny("deci")  # layers of 3 sizes, one of them without a cache
        run = ["run", *LIKELIEST, "-m", model, "--ctx", 512, "-n", 4, "-p", "hello", "--json"]
        self.fails(1, ["--kv auto", "tq tune --budget"], *run, "--kv", "auto", XDG_CACHE_HOME=cache)
        self.succeeds(*TUNE, model, XDG_CACHE_HOME=cache)
        self.fails(1, ["--kv auto", "tq tune --budget"], *run, "--kv", "auto", XDG_CACHE_HOME=cache)
        result = json.loads(self.succeeds(*TUNE, model, "--budget", 4.5, "--json", XDG_CACHE_HOME=cache).out)
        (path,) = profiles(cache)
        profile = read_profile(path)
        values = bits = 0
        for layer in profile["layers"]:
            n = layer["size"] * layer["heads"]
            values += 2 * n
            bits += n * sum(layer["bits"])
            self.assertLessEqual(set(layer["bits"]), {2, 3, 4, 5, 6, 8})
        self.assertAlmostEqual(bits / values, profile["bits"], places=9)
        self.assertLessEqual(profile["bits"], 4.5)
        self.assertGreater(profile["bits"], 4)
        measured = result["measured"]
        self.assertEqual(measured, sorted(measured, key=lambda m: m["kld_mean"]))
        self.assertEqual(measured[0]["bits"], profile["bits"])
        self.assertIn("4/4", [m["kv"] for m in measured])
        self.assertLessEqual(measured[0]["kld_mean"], next(m["kld_mean"] for m in measured if m["kv"] == "4/4"))

        answer = json.loads(self.succeeds(*run, "--kv", "auto", XDG_CACHE_HOME=cache).out)
        self.assertEqual(answer["kv"], f"auto ({profile['bits']:.2f} bits, window 32, sinks 4)")
        four, six = (json.loads(self.succeeds(*run, "--kv", kv, XDG_CACHE_HOME=cache).out)["stats"]["kv_bytes"]
                     for kv in ["4/4", "6/6"])
        self.assertGreater(answer["stats"]["kv_bytes"], four)
        self.assertLess(answer["stats"]["kv_bytes"], six)
        plan = json.loads(self.succeeds("info", model, "--ctx", 512, "--kv", "auto", "--json", XDG_CACHE_HOME=cache).out)
        planned = next(row["kv_bytes"] for row in plan["caches"] if row["kv"] == "auto")
        self.assertAlmostEqual(planned / answer["stats"]["kv_bytes"], 1, delta=0.03)
        self.fails(2, "--no-profile", *run, "--kv", "auto", "--no-profile", XDG_CACHE_HOME=cache)
        self.fails(2, "--kv auto", *run, "--kv", "auto", "--key-bits", 4, XDG_CACHE_HOME=cache)

    def test_layers_of_one_side_only(self):
        path = os.path.join(program.WORK, "mla.tqp")
        self.succeeds(*TUNE, tiny("deepseek2_mla"), "--budget", 3, "--output", path)
        for layer in read_profile(path)["layers"]:
            self.assertEqual(layer["bits"][1], 0)
            self.assertGreater(layer["bits"][0], 0)
        self.succeeds("run", *LIKELIEST, "-m", tiny("deepseek2_mla"), "--ctx", 512, "-n", 2, "-p", "hello", "--kv", "auto",
                      "--profile", path)


if __name__ == "__main__":
    program.TQ = os.path.abspath(sys.argv[1])
    if not os.path.isfile(MODEL):
        print(f"SKIPPED: TQ_TEST_SMOLLM2 is not a model file ({MODEL or 'not set'})")
        sys.exit(0)
    program.WORK = tempfile.mkdtemp(prefix="tq_test_")
    try:
        result = unittest.main(argv=[sys.argv[0], "-v", *sys.argv[2:]], exit=False).result
    finally:
        shutil.rmtree(program.WORK, ignore_errors=True)
    sys.exit(0 if result.wasSuccessful() else 1)
