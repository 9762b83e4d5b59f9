"""tq serve through the `openai` client. Usage: serve_client_test.py TQ CLASS (see serve.cmake)."""

import concurrent.futures
import json
import math
import subprocess
import time
import unittest

import openai

from serve_testing import MODEL, TQ, RawStream, Server, environment, main

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "How many days has a week?",
             "Tell me about whales.", "What is a prime number?", "Write a line about rain.", "Who wrote Hamlet?"]
STORY = ("The lighthouse stood at the end of a long spit of gravel, and in winter the road to it was under water twice a day. "
         "Martha had kept the lamp for eleven years. She knew the sound each wind made in the gallery rails, and she could "
         "tell from the kitchen whether the glass needed cleaning. When the harbour board wrote that the light would be run "
         "by a machine, she read the letter twice, put it under the clock, and went up to trim the wick. ")


class WithServer(unittest.TestCase):
    arguments = ["--parallel", 4, "--ctx", 2048]

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.arguments)
        cls.client = openai.OpenAI(base_url=f"http://127.0.0.1:{cls.server.port}/v1", api_key="none", max_retries=0,
                                   timeout=60)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.close()

    def chat(self, text, n=24, reuse=False, extra_body=None, **more):
        """Greedy. Without reuse: a cache that was cut back has lost exact rows, which may change an answer (docs/serve.md)."""
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model="any", messages=messages, max_tokens=n, temperature=0,
                                                   extra_body={"cache_prompt": reuse, **(extra_body or {})}, **more)

    def complete(self, prompt, n, extra_body=None, **more):
        return self.client.completions.create(model="any", prompt=prompt, max_tokens=n, temperature=0,
                                              extra_body={"cache_prompt": False, **(extra_body or {})}, **more)


class Chat(WithServer):
    def test_models(self):
        models = list(self.client.models.list())
        self.assertEqual(len(models), 1)
        self.assertEqual(self.client.models.retrieve(models[0].id).id, models[0].id)
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.models.retrieve("nothing/like-this")
        self.assertEqual(caught.exception.code, "model_not_found")

    def test_answer(self):
        answer = self.chat("Name the planet we live on.")
        self.assertIn("Earth", answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertGreater(answer.usage.prompt_tokens, 10)
        timings = answer.model_extra["timings"]
        self.assertEqual(timings["predicted_n"], answer.usage.completion_tokens)
        self.assertEqual(timings["prompt_n"] + timings["cache_n"], answer.usage.prompt_tokens)
        self.assertEqual(timings["context_size"], 2048)
        self.assertGreater(timings["kv_f16_bytes"], 2 * timings["kv_bytes"])

    def test_stream_gives_the_same_text(self):
        whole = self.chat(QUESTIONS[1])
        chunks = list(self.chat(QUESTIONS[1], stream=True, stream_options={"include_usage": True}))
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
                         whole.choices[0].message.content)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason],
                         [whole.choices[0].finish_reason])
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertTrue(all(c.usage is None for c in chunks[:-1]))
        self.assertEqual(len({c.id for c in chunks}), 1)
        self.assertTrue(all(c.choices for c in self.chat(QUESTIONS[1], n=3, stream=True)), "no usage unless asked for")

    def test_limits_are_exact(self):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = self.client.chat.completions.create(
                model="any", messages=[{"role": "user", "content": QUESTIONS[4]}], temperature=0, **{name: 5})
            self.assertEqual(answer.usage.completion_tokens, 5)
            self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(self.chat("Say yes.", n=1).usage.completion_tokens, 1)

    def test_the_end_of_an_answer_is_stop(self):
        answer = self.chat("What is 2+2? Answer with one word.", n=200)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertNotIn("<|im_end|>", answer.choices[0].message.content)

    def test_a_full_context_is_length(self):
        answer = self.client.completions.create(model="any", prompt=[40] * 2044, temperature=0, logit_bias={"40": 100})
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 5)  # the last token needs no place of its own

    def test_stop_strings_do_not_leak(self):
        whole = self.chat(QUESTIONS[2], n=40).choices[0].message.content
        for stop in (whole[10:14], whole[17:30], whole[25:27]):
            cut = whole[:whole.index(stop)]
            answer = self.chat(QUESTIONS[2], n=40, stop=stop)
            self.assertEqual(answer.choices[0].message.content, cut)
            self.assertEqual(answer.choices[0].finish_reason, "stop")
            seen = ""
            for chunk in self.chat(QUESTIONS[2], n=40, stop=["no such text", stop], stream=True):
                seen += chunk.choices[0].delta.content or ""
                self.assertTrue(cut.startswith(seen), (cut, seen))
            self.assertEqual(seen, cut)
        # What only looked like a stop string comes out in the end.
        answer = self.chat(QUESTIONS[2], n=40, stop=whole[-3:] + "never")
        self.assertEqual(answer.choices[0].message.content, whole)

    def test_logprobs(self):
        plain = self.chat(QUESTIONS[0], n=8)
        answer = self.chat(QUESTIONS[0], n=8, logprobs=True, top_logprobs=5)
        self.assertEqual(answer.choices[0].message.content, plain.choices[0].message.content)
        entries = answer.choices[0].logprobs.content
        self.assertEqual(b"".join(bytes(e.bytes) for e in entries).decode(), answer.choices[0].message.content)
        for entry in entries:
            self.assertEqual(len(entry.top_logprobs), 5)
            self.assertEqual(entry.token, entry.top_logprobs[0].token, "greedy takes the likeliest")
            self.assertLessEqual(sum(math.exp(t.logprob) for t in entry.top_logprobs), 1 + 1e-6)
            self.assertGreater(sum(math.exp(t.logprob) for t in entry.top_logprobs), 0.1)
        streamed = [e for c in self.chat(QUESTIONS[0], n=8, logprobs=True, stream=True)
                    if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        self.assertEqual([e.token for e in streamed], [e.token for e in entries])
        for a, b in zip(streamed, entries):
            self.assertAlmostEqual(a.logprob, b.logprob, delta=0.05)
        self.assertIsNone(plain.choices[0].logprobs)
        # Those of tokens that a stop string cut off are not there.
        content = answer.choices[0].message.content
        cut = self.chat(QUESTIONS[0], n=8, logprobs=True, stop=content[8:11])
        kept = b"".join(bytes(e.bytes) for e in cut.choices[0].logprobs.content).decode()
        self.assertTrue(kept.startswith(content[:8]) and len(kept) < len(content), (kept, content))

    def test_completions(self):
        answer = self.complete("One, two, three,", 6, logprobs=2)
        text = answer.choices[0].text
        self.assertIn("four", text)
        scores = answer.choices[0].logprobs
        self.assertEqual("".join(scores.tokens), text)
        self.assertEqual([text[o:].startswith(t) for o, t in zip(scores.text_offset, scores.tokens)], [True] * 6)
        self.assertTrue(all(len(t) == 2 for t in scores.top_logprobs))
        status, tokens = self.server.post("/tokenize", {"content": "One, two, three,"})
        self.assertEqual(status, 200)
        by_tokens = self.complete(tokens["tokens"], 6)
        self.assertEqual(by_tokens.choices[0].text, text)
        self.assertEqual((by_tokens.usage.prompt_tokens, by_tokens.usage.completion_tokens, by_tokens.usage.total_tokens),
                         (len(tokens["tokens"]), 6, len(tokens["tokens"]) + 6))
        streamed = self.complete("One, two, three,", 6, stream=True)
        self.assertEqual("".join(c.choices[0].text for c in streamed), text)
        self.assertEqual(self.server.post("/detokenize", tokens)[1]["content"], "One, two, three,")

    def test_sampling_fields_reach_the_sampler(self):
        def text(extra_body=None, **fields):
            return self.client.chat.completions.create(
                model="any", messages=[{"role": "user", "content": QUESTIONS[6]}], max_tokens=16,
                extra_body={"cache_prompt": False, **(extra_body or {})}, **fields).choices[0].message.content
        self.assertEqual(text(temperature=1, seed=1), text(temperature=1, seed=1))
        self.assertGreater(len({text(temperature=1, seed=s) for s in range(4)}), 1)
        likeliest = text(temperature=0)
        self.assertEqual(text(temperature=1, extra_body={"top_k": 1}), likeliest)
        self.assertEqual(text(temperature=1, top_p=1e-6), likeliest)
        self.assertEqual(text(temperature=1, extra_body={"min_p": 1}), likeliest)
        repeated = "na na na na na na na na na na na na na"
        plain = self.complete(repeated, 12).choices[0].text
        self.assertIn("na na", plain)
        for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repeat_penalty": 1.5}}):
            self.assertNotEqual(self.complete(repeated, 12, **fields).choices[0].text, plain, fields)

    def test_logit_bias(self):
        first = self.server.post("/tokenize", {"content": self.chat("Say hello.", n=1).choices[0].message.content})[1]["tokens"][0]
        self.assertNotEqual(self.chat("Say hello.", n=1, logit_bias={str(first): -100}).choices[0].message.content,
                            self.chat("Say hello.", n=1).choices[0].message.content)
        whale = self.server.post("/tokenize", {"content": " whale"})[1]["tokens"]
        self.assertEqual(len(whale), 1)
        self.assertEqual(self.chat("Say hello.", n=3, logit_bias={str(whale[0]): 100}).choices[0].message.content,
                         " whale" * 3)

    def test_content_parts_and_roles(self):
        plain = self.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}])
        parts = self.chat([{"role": "developer", "content": "Be brief."},
                           {"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]}])
        self.assertEqual(parts.choices[0].message.content, plain.choices[0].message.content)

    def test_characters_are_whole(self):
        prompt = "😀 🐋 🎉 €uro Übermut 日本語 😀 🐋 🎉 €uro Übermut 日本語 😀 🐋"
        whole = self.complete(prompt, 24)
        self.assertTrue(any(ord(c) > 0x7F for c in whole.choices[0].text), whole.choices[0].text)
        pieces = [c.choices[0].text for c in self.complete(prompt, 24, stream=True)]
        self.assertEqual("".join(pieces), whole.choices[0].text)
        self.assertNotIn("\ufffd", "".join(pieces[:-2]))

    def test_errors_have_openais_shape(self):
        for fields, param in (({"extra_body": {"n": 2}}, "n"), ({"response_format": {"type": "json_object"}}, "response_format"),
                              ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
                              ({"extra_body": {"top_k": "many"}}, "top_k")):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.chat("x", **fields)
            self.assertEqual((caught.exception.param, caught.exception.type), (param, "invalid_request_error"))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat("word " * 3000)
        self.assertEqual(caught.exception.code, "context_length_exceeded")

    def test_a_conversation_reads_only_what_is_new(self):
        messages = [{"role": "user", "content": STORY * 2 + "What did Martha keep?"}]
        first = self.chat(messages, n=12, reuse=True)
        messages += [{"role": "assistant", "content": first.choices[0].message.content},
                     {"role": "user", "content": "For how many years?"}]
        second = self.chat(messages, n=12, reuse=True)
        cached = second.usage.prompt_tokens_details.cached_tokens
        self.assertGreaterEqual(cached, first.usage.prompt_tokens)
        self.assertLess(second.usage.prompt_tokens - cached, 40)
        off = self.chat(messages, n=12)
        self.assertEqual(off.usage.prompt_tokens_details.cached_tokens, 0)


    def test_a_cut_cache_gets_its_exact_rows_again(self):
        question = STORY + "What did she trim?"
        first = self.chat(question, n=40, reuse=True)
        self.assertGreater(first.usage.completion_tokens, 12, "the answer has moved the window on")
        again = self.chat(question, n=4, reuse=True)
        prompt = first.usage.prompt_tokens
        self.assertEqual(again.usage.prompt_tokens_details.cached_tokens, prompt - 1 - 32)
        self.assertEqual(again.choices[0].message.content, self.chat(question, n=4).choices[0].message.content)


class Batching(WithServer):
    """Several at once answer as each would alone."""

    def texts(self, answers):
        return [a.choices[0].message.content for a in answers]

    def test_together_as_alone(self):
        def ask(question):
            choice = self.chat(question, n=30, logprobs=True).choices[0]
            return choice.message.content, [entry.logprob for entry in choice.logprobs.content]
        prompts = [STORY * (i % 3) + q for i, q in enumerate(QUESTIONS[:6])]
        alone = [ask(p) for p in prompts]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            together = list(pool.map(ask, prompts))
        self.assertEqual([text for text, _ in together], [text for text, _ in alone])
        for (_, scores), (_, expected) in zip(together, alone):  # the same to the last bit on the machines we have seen
            self.assertLess(max(abs(a - b) for a, b in zip(scores, expected)), 0.01)

    def test_as_tq_run(self):
        for question in QUESTIONS[:1]:
            done = subprocess.run([TQ, "run", "-m", MODEL, "-p", question, "--temp", "0", "-n", "24", "--threads", "1",
                                   "--ctx", "2048"], env=environment(), capture_output=True, check=True)
            answer = self.chat(question)
            self.assertEqual(answer.choices[0].message.content + "\n", done.stdout.decode())

    def test_conversations_do_not_leak_into_each_other(self):
        def talk(server, topic, turns=2):
            messages = []
            answers = []
            for turn in range(turns):
                messages.append({"role": "user", "content": f"Tell me fact {turn + 1} about {topic}."})
                answer = server.chat(messages, n=16)["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": answer})
                answers.append(answer)
            return answers
        topics = ["whales", "Rome", "bread"]
        alone = []
        for topic in topics:  # each on a server that has seen nothing else
            with Server(*self.arguments) as server:
                alone.append(talk(server, topic))
        with Server(*self.arguments) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda topic: talk(server, topic), topics))
        self.assertEqual(together, alone)

    def test_a_running_conversations_prefix_is_copied(self):
        system = {"role": "system", "content": STORY * 4}
        stream = RawStream(self.server, {"messages": [system, {"role": "user", "content": "Go on with the story."}],
                                         "temperature": 0, "max_tokens": 400})
        events = stream.events()
        for _ in range(3):
            next(events)
        answer = self.chat([system, {"role": "user", "content": "Who kept the lamp?"}], n=8, reuse=True)
        self.assertGreater(self.server.busy(), 0, "the first one still runs")
        stream.close()
        cached = answer.usage.prompt_tokens_details.cached_tokens
        self.assertGreater(cached, answer.usage.prompt_tokens * 0.85)
        again = self.chat([system, {"role": "user", "content": "Who kept the lamp?"}], n=8, reuse=True)
        self.assertEqual(again.choices[0].message.content, answer.choices[0].message.content)
        self.server.wait_idle()

    def test_hanging_up_frees_the_slot_at_once(self):
        for stream_first in (True, False):
            body = {"messages": [{"role": "user", "content": "Write a very long story."}], "temperature": 0, "max_tokens": 1500,
                    "logit_bias": {"2": -100}, "stream": stream_first}
            raw = RawStream.__new__(RawStream)
            if stream_first:
                raw = RawStream(self.server, body)
                events = raw.events()
                for _ in range(3):
                    next(events)
                raw.close()
            else:
                import socket
                data = json.dumps(body).encode()
                with socket.create_connection(("127.0.0.1", self.server.port)) as s:
                    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                              + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
                    while self.server.busy() == 0:
                        time.sleep(0.01)
            self.assertLess(self.server.wait_idle(), 1)
        self.server.wait_logged(lambda line: line.get("outcome") == "cancelled", 2)

    def test_running_streams_flow_while_a_long_prompt_is_read(self):
        stream = RawStream(self.server, {"messages": [{"role": "user", "content": "Write a long story."}], "temperature": 0,
                                         "max_tokens": 60, "logit_bias": {"2": -100}})
        events = stream.events()
        for _ in range(4):
            next(events)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            long = pool.submit(self.chat, STORY * 8 + "Who?", 1)
            tokens = 0
            for _ in events:
                tokens += 0 if long.done() else 1
            self.assertGreater(long.result().usage.prompt_tokens, 700)
        self.assertGreater(tokens, 10, "the stream went on while the prompt was read")
        stream.close()


if __name__ == "__main__":
    main(globals())
