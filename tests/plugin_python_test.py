"""llama-cpp-python as an unmodified host: turboquant_cpp.enable() and nothing else.

Models and the plug-in come from TQ_TEST_SMOLLM2, TQ_TEST_GEMMA and TQ_TEST_PLUGIN. Exit status 77: nothing to test with.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import unittest
from pathlib import Path

SMOLLM2 = os.environ.get("TQ_TEST_SMOLLM2", "")
GEMMA = os.environ.get("TQ_TEST_GEMMA", "")
PLUGIN = os.environ.get("TQ_TEST_PLUGIN", "")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

if not SMOLLM2 or not PLUGIN:
    print("TQ_TEST_SMOLLM2 or TQ_TEST_PLUGIN is not set")
    sys.exit(77)
for name in [n for n in os.environ if n.startswith("TURBOQUANT_")]:
    del os.environ[name]
os.environ["TURBOQUANT_PLUGIN"] = PLUGIN

try:
    import llama_cpp
except ImportError as error:
    print(f"no llama-cpp-python: {error}")
    sys.exit(77)
import turboquant_cpp

LOG: list[str] = []


@llama_cpp.llama_log_callback
def _collect(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    LOG.append(text.decode(errors="replace"))


llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))


def cache_mib() -> float:
    """The KV buffers that the host reported since the log was cleared."""
    return sum(float(m) for m in re.findall(r"KV buffer size =\s*([0-9.]+) MiB", "".join(LOG)))


def make(path: str = SMOLLM2, **arguments: object) -> llama_cpp.Llama:
    LOG.clear()
    return llama_cpp.Llama(model_path=path, n_ctx=1024, n_batch=256, n_threads=2, n_threads_batch=2, verbose=False,
                           **arguments)  # type: ignore[arg-type]


def ask(llm: llama_cpp.Llama, question: str) -> str:
    answer = llm.create_chat_completion(messages=[{"role": "user", "content": question}], max_tokens=32, temperature=0)
    return answer["choices"][0]["message"]["content"]  # type: ignore[index]


class Enabled(unittest.TestCase):
    def tearDown(self) -> None:
        turboquant_cpp.disable()

    def test_chat_and_size(self) -> None:
        llm = make()
        stock = cache_mib()
        llm.close()
        turboquant_cpp.enable(key_bits=4, value_bits=4)
        llm = make()
        self.assertIn("TurboQuant", "".join(LOG))
        self.assertGreater(stock, 2.8 * cache_mib())
        self.assertIn("Earth", ask(llm, "Name the planet we live on."))
        llm.close()

    def test_settings_reach_the_plugin(self) -> None:
        sizes = {}
        for bits in (3, 4, 8):
            status = turboquant_cpp.enable(bits, bits, window=0, sinks=0)
            self.assertEqual(status.settings["TURBOQUANT_KV"], f"{bits}/{bits}")
            make().close()
            sizes[bits] = cache_mib()
        self.assertLess(sizes[3], sizes[4])
        self.assertLess(sizes[4], 0.6 * sizes[8])
        turboquant_cpp.enable(preset="tq6")
        make().close()
        self.assertIn("keys 6 bits, values 5 bits", "".join(LOG))

    def test_status(self) -> None:
        status = turboquant_cpp.enable(5, 4, window=16)
        self.assertTrue(status.enabled)
        self.assertEqual(status.plugin, Path(PLUGIN).resolve())
        self.assertEqual(status.device, "TQ0")
        self.assertRegex(status.version or "", r"^\d+\.\d+\.\d+$")
        self.assertEqual(status.settings["TURBOQUANT_WINDOW"], "16")
        turboquant_cpp.disable()
        self.assertFalse(turboquant_cpp.status().enabled)
        self.assertNotIn("TURBOQUANT_KV", os.environ)

    def test_conditioning(self) -> None:
        status = turboquant_cpp.enable(profile=__file__, calibrate=False)
        self.assertEqual(status.settings["TURBOQUANT_PROFILE"], __file__)
        self.assertEqual(status.settings["TURBOQUANT_CALIBRATE"], "off")
        with self.assertRaises(ValueError):  # llama-cpp-python's way of saying that the context could not be made
            make()
        self.assertIn(__file__, "".join(LOG))  # no profile
        turboquant_cpp.enable()
        self.assertNotIn("TURBOQUANT_PROFILE", os.environ)
        make().close()

    def test_disable_gives_the_stock_cache_back(self) -> None:
        llm = make()
        stock, answer = cache_mib(), ask(llm, "Name three colours.")
        llm.close()
        turboquant_cpp.enable()
        make().close()
        turboquant_cpp.disable()
        llm = make(n_gpu_layers=-1, flash_attn=True)
        self.assertNotIn("TQ0", "".join(LOG))
        self.assertEqual(cache_mib(), stock)
        llm.close()
        llm = make()
        self.assertEqual(ask(llm, "Name three colours."), answer)
        llm.close()

    def test_contradictions(self) -> None:
        turboquant_cpp.enable()
        for arguments in ({"n_gpu_layers": 0}, {"flash_attn": False}, {"offload_kqv": False}, {"type_k": 8}, {"type_v": 2}):
            with self.assertRaises(ValueError, msg=str(arguments)) as caught:
                make(**arguments)
            self.assertIn(next(iter(arguments)), str(caught.exception))
        with self.assertRaises(ValueError) as caught:
            make(n_gpu_layers=3)
        self.assertIn("n_gpu_layers=3", str(caught.exception))
        make(n_gpu_layers=-1, flash_attn=True, offload_kqv=True, type_k=1).close()

    def test_wrong_settings(self) -> None:
        for arguments in ({"key_bits": 7}, {"value_bits": 0}, {"key_bits": "4"}, {"preset": "tq9"}, {"window": -1}, {"sinks": 1.5},
                          {"preset": "tq4", "key_bits": 5}, {"profile": "/nonexistent/model.tqp"}):
            with self.assertRaises(ValueError, msg=str(arguments)):
                turboquant_cpp.enable(**arguments)  # type: ignore[arg-type]
        self.assertFalse(turboquant_cpp.status().enabled)

    def test_missing_plugin(self) -> None:
        os.environ["TURBOQUANT_PLUGIN"] = "/nonexistent/plugin.so"
        try:
            with self.assertRaises(turboquant_cpp.PluginError) as caught:
                turboquant_cpp.plugin_path()
            self.assertIn("/nonexistent/plugin.so", str(caught.exception))
        finally:
            os.environ["TURBOQUANT_PLUGIN"] = PLUGIN

    def test_saved_state_continues(self) -> None:
        turboquant_cpp.enable()
        llm = make()
        llm.eval(llm.tokenize(b"Once upon a time there was a lighthouse keeper who"))
        state = llm.save_state()

        def go_on() -> list[int]:
            tokens = []
            for _ in range(16):
                token = llm.sample(temp=0)
                tokens.append(token)
                llm.eval([token])
            return tokens

        llm.eval(llm.tokenize(b" lived", add_bos=False))
        first = go_on()
        llm.load_state(state)
        llm.eval(llm.tokenize(b" lived", add_bos=False))
        self.assertEqual(go_on(), first)
        llm.close()

    @unittest.skipUnless(GEMMA, "TQ_TEST_GEMMA is not set")
    def test_gemma(self) -> None:
        prompt = "The capital of France is Paris. The capital of Italy is"
        turboquant_cpp.enable(preset="tq4")
        llm = make(GEMMA)
        self.assertIn("TurboQuant", "".join(LOG))
        text = llm.create_completion(prompt, max_tokens=6, temperature=0)["choices"][0]["text"]  # type: ignore[index]
        self.assertIn("Rome", text)
        llm.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
