"""A stock llama-server with the plug-in: GGML_BACKEND_PATH=... llama-server --device TQ0 -fa on, and HTTP on the loopback.

TQ_TEST_LLAMA_SERVER, TQ_TEST_SMOLLM2 and TQ_TEST_PLUGIN say where things are. Exit status 77: nothing to test with.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import unittest
from typing import Any, Optional

from server_process import ServerProcess, free_port

SERVER = os.environ.get("TQ_TEST_LLAMA_SERVER", "")
SMOLLM2 = os.environ.get("TQ_TEST_SMOLLM2", "")
GEMMA = os.environ.get("TQ_TEST_GEMMA", "")
PLUGIN = os.environ.get("TQ_TEST_PLUGIN", "")

if not SERVER or not SMOLLM2 or not PLUGIN:
    print("TQ_TEST_LLAMA_SERVER, TQ_TEST_SMOLLM2 or TQ_TEST_PLUGIN is not set")
    sys.exit(77)


class Server(ServerProcess):
    """A llama-server of this test's own; always ended."""

    def __init__(self, model: str, *arguments: str, **variables: str):
        folder, port = tempfile.mkdtemp(prefix="tq_server_"), free_port()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TURBOQUANT_")}
        environment.update(GGML_BACKEND_PATH=PLUGIN, **variables)
        command = [SERVER, "-m", model, "--host", "127.0.0.1", "--port", port, "-t", "2", "-c", "4096", "-np", "4", "-lv", "4",
                   "--slot-save-path", folder, *arguments]
        super().__init__(command, port, environment, folder=folder)

    def starts(self) -> bool:
        """False if it ended before it was ready."""
        try:
            self.wait_ready()
        except RuntimeError:
            return False
        return True

    def answer(self, path: str, body: Optional[dict[str, Any]] = None) -> dict[str, Any]:
        status, answer = self.post(path, body or {})
        assert status == 200, (path, status, answer)
        return answer  # type: ignore[no-any-return]

    def complete(self, prompt: str, n: int = 12, **more: Any) -> dict[str, Any]:
        return self.answer("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "cache_prompt": False, **more})


def cache_mib(log: str) -> float:
    return sum(float(m) for m in re.findall(r"KV buffer size =\s*([0-9.]+) MiB", log))


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


STORY = ("The lighthouse stood at the end of a long spit of gravel, and in winter the road to it was under water twice a day. Martha had "
         "kept the lamp for eleven years. She knew the sound each wind made in the gallery rails, and she could tell from the kitchen "
         "whether the glass needed cleaning. When the harbour board wrote that the light would be run by a machine, she read the letter "
         "twice, put it under the clock, and went up to trim the wick as she did every evening. The machine arrived in March on a flat "
         "cart. It was a grey box no larger than a suitcase, with a row of small lamps and a paper drum that turned once an hour. Two men "
         "bolted it to the floor and showed her how the drum recorded the weather. For a month both of them kept the light, the woman and "
         "the box, and neither made a mistake. In April a fog came in that lasted nine days.")

QUESTIONS = ("What is the capital of France?", "What is the opposite of hot?", "Name the planet we live on.", "How many days has a week?")


class StockServer(unittest.TestCase):
    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(SMOLLM2, "--device", "TQ0", "-fa", "on", TURBOQUANT_KV="5/4")
        if not cls.server.starts():
            log = cls.server.log()
            cls.server.close()
            raise RuntimeError("llama-server ended:\n" + log[-3000:])
        cls.server.complete(STORY, 1)  # the cache calibrates now, so that all tests meet the same

    @classmethod
    def tearDownClass(cls) -> None:
        status = cls.server.process.poll()
        cls.server.close()
        assert status is None, f"llama-server died with status {status}"

    def test_cache_is_ours(self) -> None:
        log = self.server.log()
        self.assertIn("turboquant: KV cache: keys 5 bits, values 4 bits", log)
        # 30 layers, 3 heads of 64, keys and values, 4096 cells at 2 bytes: 90 MiB.
        self.assertGreater(cache_mib(log), 20)
        self.assertLess(cache_mib(log), 32)

    def test_calibrates_once(self) -> None:
        self.server.complete(STORY, 1)
        self.assertEqual(self.server.log().count("keys are conditioned from the first 128 rows of this cache (30 layers)"), 1)

    def test_chat(self) -> None:
        answer = self.server.answer("/v1/chat/completions", {
            "messages": [{"role": "user", "content": QUESTIONS[2]}], "max_tokens": 24, "temperature": 0})
        self.assertIn("Earth", answer["choices"][0]["message"]["content"])

    def test_four_slots_agree_with_each_alone(self) -> None:
        alone = [self.server.complete(chat(q))["content"] for q in QUESTIONS]
        together: list[Optional[str]] = [None] * len(QUESTIONS)

        def work(i: int) -> None:
            together[i] = self.server.complete(chat(QUESTIONS[i]), id_slot=i)["content"]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(QUESTIONS))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        self.assertEqual(together, alone)
        for text, word in zip(alone, ("Paris", "cold", "Earth")):
            self.assertIn(word, text)

    def test_slot_save_and_restore(self) -> None:
        start = chat("Tell me a story about a lighthouse.")
        first = self.server.complete(start, 40, id_slot=1, cache_prompt=True)
        text = start + first["content"]
        saved = self.server.answer("/slots/1?action=save", {"filename": "slot.bin"})
        self.assertGreater(saved["n_saved"], 40)
        expected = self.server.complete(text, 16, id_slot=1, cache_prompt=True)
        self.server.answer("/slots/1?action=erase")
        restored = self.server.answer("/slots/1?action=restore", {"filename": "slot.bin"})
        self.assertEqual(restored["n_restored"], saved["n_saved"])
        again = self.server.complete(text, 16, id_slot=1, cache_prompt=True)
        self.assertLess(again["timings"]["prompt_n"], 8, "the restored rows were not used")
        self.assertEqual(again["content"], expected["content"])
        # Into another slot.
        self.server.answer("/slots/3?action=restore", {"filename": "slot.bin"})
        other = self.server.complete(text, 16, id_slot=3, cache_prompt=True)
        self.assertLess(other["timings"]["prompt_n"], 8)
        self.assertEqual(other["content"][:20], expected["content"][:20])


class OtherCommandLines(unittest.TestCase):
    def start(self, model: str, *arguments: str, **variables: str) -> Server:
        server = Server(model, *arguments, **variables)
        self.addCleanup(server.close)
        return server

    def test_flash_attention_off_is_refused_in_words(self) -> None:
        server = self.start(SMOLLM2, "--device", "TQ0", "-fa", "off")
        self.assertFalse(server.starts())
        self.assertGreater(server.process.wait(10), 0, server.log()[-2000:])
        self.assertIn("flash attention", server.log())

    def test_slot_of_another_run_is_restored(self) -> None:
        with tempfile.TemporaryDirectory(prefix="tq_slots_") as folder:
            arguments = ("--device", "TQ0", "-fa", "on", "--slot-save-path", folder)
            first = self.start(SMOLLM2, *arguments)
            self.assertTrue(first.starts(), first.log()[-2000:])
            start = STORY + " The fog"
            text = start + first.complete(start, 20, id_slot=0, cache_prompt=True)["content"]
            saved = first.answer("/slots/0?action=save", {"filename": "slot.bin"})
            self.assertGreater(saved["n_saved"], 180)
            expected = first.complete(text, 24, id_slot=0, cache_prompt=True)
            # Begun anew, the story goes on as it did: not a near tie, and only to be known from its rows.
            cut = STORY.rindex(" ", 0, len(STORY) // 4)
            anew = text + "\n\n" + STORY[:cut]
            expected_anew = first.complete(anew, 12, id_slot=0, cache_prompt=True)["content"]
            self.assertEqual(expected_anew[:20], STORY[cut : cut + 20])
            first.close()
            # A new process knows nothing of that cache's conditioning but what the rows bring.
            second = self.start(SMOLLM2, *arguments)
            self.assertTrue(second.starts(), second.log()[-2000:])
            restored = second.answer("/slots/0?action=restore", {"filename": "slot.bin"})
            self.assertEqual(restored["n_restored"], saved["n_saved"])
            again = second.complete(text, 24, id_slot=0, cache_prompt=True)
            self.assertLess(again["timings"]["prompt_n"], 8, "the restored rows were not used")
            self.assertEqual(again["content"], expected["content"])
            # One that has calibrated on something else translates them.
            third = self.start(SMOLLM2, *arguments)
            self.assertTrue(third.starts(), third.log()[-2000:])
            third.complete(" ".join(QUESTIONS) * 8, 1, id_slot=1)
            third.answer("/slots/0?action=restore", {"filename": "slot.bin"})
            translated = third.complete(anew, 12, id_slot=0, cache_prompt=True)
            self.assertLess(translated["timings"]["prompt_n"], saved["n_saved"] // 2, "the restored rows were not used")
            self.assertEqual(translated["content"][:20], expected_anew[:20])

    def test_wrong_setting_is_named(self) -> None:
        server = self.start(SMOLLM2, "--device", "TQ0", "-fa", "on", TURBOQUANT_KV="nonsense")
        self.assertFalse(server.starts())
        self.assertGreater(server.process.wait(10), 0, server.log()[-2000:])
        self.assertIn("TURBOQUANT_KV=nonsense", server.log())

    @unittest.skipUnless(GEMMA, "TQ_TEST_GEMMA is not set")
    def test_gemma(self) -> None:
        server = self.start(GEMMA, "--device", "TQ0", "-fa", "on")
        self.assertTrue(server.starts(), server.log()[-2000:])
        self.assertIn("turboquant: KV cache", server.log())
        answer = server.complete("The capital of France is Paris. The capital of Italy is", 6)
        self.assertIn("Rome", answer["content"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
