"""The web page of tq serve in a real browser: serve_page_test.py TQ [TEST...] [--screenshots DIR]

Headless Chromium (CHROMIUM=, else from the path) is driven by keys and clicks over its DevTools protocol (cdp.py). Needs TQ_TEST_SMOLLM2.
Exit status 77: nothing to test with. --screenshots writes page.png, page-dark.png, page-phone.png and page-start.png there and tests nothing.
Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import unittest
from typing import Any

import cdp
from serve_testing import MODEL, Server, free_port

PLANET = "Name the planet we live on."
LONG = "Write a long story about a lighthouse keeper."
KEY = "page-test-key"
# Small, and one thread: other tests run beside these.
LEAN = ("--threads", "1", "--ctx", "2048", "--parallel", "2", "--no-profile")

# What the page shows, as JavaScript expressions.
BUSY = "!document.querySelector('#stop').hidden"
IDLE = "document.querySelector('#stop').hidden"
ANSWER = "([...document.querySelectorAll('#messages .answer .prose')].at(-1)?.textContent ?? '')"
FAILURE = "(document.querySelector('#messages .failure')?.textContent ?? '')"
SIDEBAR = "document.querySelector('#new').checkVisibility({ visibilityProperty: true })"
CHATS = "Object.keys(localStorage).filter((k) => k.startsWith('tq.chat.')).map((k) => JSON.parse(localStorage[k]))"


def stream(*events: Any, end: str = "data: [DONE]\n\n") -> tuple[int, dict[str, str], str]:
    """A streamed answer made of these texts (or whole events)."""
    whole = [e if isinstance(e, dict) else {"choices": [{"index": 0, "delta": {"content": e}, "finish_reason": None}]} for e in events]
    return 200, {"Content-Type": "text/event-stream"}, "".join(f"data: {json.dumps(e)}\n\n" for e in whole) + end


def error(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], str]:
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body)


def shown_size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.{0 if unit == 'B' or n >= 100 else 1}f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


class Case(unittest.TestCase):
    server: Server
    browser: cdp.Browser
    page: cdp.Page

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = shared_server()
        cls.page = shared_page()
        cls.browser = cls.page.browser

    def setUp(self) -> None:
        self.open(self.server)
        self.connected()

    def tearDown(self) -> None:
        self.page.answer_with(None)
        self.assertEqual(self.page.errors, [], "the console complained")

    def open(self, server: Server) -> None:
        """The page as in a browser that was never here."""
        self.page.forget()
        self.page.screen(1280, 800)
        self.page.scheme("light")
        self.page.open(server.address)

    def connected(self) -> None:
        self.page.wait("document.querySelector('#model').textContent.includes('KV')", "the page to meet its server")

    def substitute(self, *answers: tuple[int, dict[str, str], str]) -> None:
        """The next requests for an answer get these instead of the server's."""
        left = list(answers)
        self.page.answer_with(lambda address: left.pop(0) if left and "completions" in address else None)

    def settings(self, **values: Any) -> None:
        """Sets what the dialog would, and nothing else."""
        self.page.run("document.querySelector('#settings').focus()")
        self.page.press("Enter")
        self.page.wait("document.querySelector('#options').open", "the settings to open")
        for name, value in values.items():
            self.page.fill(f"#options [name={name}]", str(value))
        self.page.run("document.querySelector('#options [name=seed]').focus()")
        self.page.press("Enter")
        self.page.wait("!document.querySelector('#options').open", "the settings to be taken")

    def ask(self, question: str, done: bool = True, keys: bool = False) -> str:
        """Asks, with a key press for each character or all at once; waits for the answer unless told otherwise."""
        count = len(self.page.requests)
        self.page.run("document.querySelector('#question').focus()")
        (self.page.type if keys else self.page.insert)(question)
        self.assertEqual(self.page.run("document.querySelector('#question').value"), question)
        self.page.press("Enter")
        self.page.wait("document.querySelector('#question').value === ''", "the question to be taken")
        return self.answered(count) if done else ""

    def answered(self, count: int) -> str:
        end = time.monotonic() + cdp.PATIENCE
        while len(self.page.requests) <= count:
            self.assertLess(time.monotonic(), end, "nothing was asked")
            self.browser.pump(0.05)
        self.page.wait(IDLE, "the answer to end")
        return str(self.page.run(ANSWER))


class Chat(Case):
    def test_answer_streams_in(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        # Lengths of the answer while it is on its way, noted whenever the page changes it.
        self.page.run("window.lengths = []; new MutationObserver(() => {" f" if ({BUSY}) lengths.push({ANSWER}.length);" " })"
                      ".observe(document.querySelector('#messages'), { childList: true, subtree: true, characterData: true }); 0")
        self.assertIn("Earth", self.ask(PLANET, keys=True))
        lengths = self.page.run("lengths.filter((n, i) => n !== lengths[i - 1])")
        self.assertGreater(len(lengths), 3, "the answer came in one piece")
        self.assertEqual(self.page.run("document.querySelector('#messages .bubble').textContent"), PLANET)
        self.assertEqual(self.page.run("document.activeElement.id"), "question")
        self.assertIn("Earth", self.page.run("document.querySelector('#status').textContent"), "screen readers hear the whole answer")

    def test_memory_context_and_speed_are_the_servers(self) -> None:
        props = self.server.get_json("/props")
        self.connected()
        self.assertIn(shown_size(props["kv"]["bytes"]), self.page.run("document.querySelector('#welcome').textContent"))
        self.assertIn(shown_size(props["kv"]["f16_bytes"]), self.page.run("document.querySelector('#welcome').textContent"))
        self.assertIn(props["model"]["id"], self.page.run("document.querySelector('#model').textContent"))
        self.settings(temperature=0, max_tokens=12)
        self.ask(PLANET)
        timings = self.page.run(CHATS)[0]["messages"][-1]["timings"]
        shown = self.page.run("document.querySelector('#gauges').innerText")
        self.assertGreater(timings["kv_f16_bytes"], 3 * timings["kv_bytes"])
        for text in (shown_size(timings["kv_bytes"]), shown_size(timings["kv_f16_bytes"]), f"{timings['kv_f16_bytes'] / timings['kv_bytes']:.1f}×",
                     f"{timings['context_used']:,} of {timings['context_size']:,} tokens", f"{timings['predicted_per_second']:.1f} tok/s"):
            self.assertIn(text, shown)
        self.assertEqual(timings["context_size"], props["context"]["per_slot"])
        # The bar is as long as the share says.
        share = self.page.run("(() => { const bar = document.querySelector('#kv-bar'); bar.firstElementChild.style.transition = 'none';"
                              " return bar.firstElementChild.getBoundingClientRect().width / bar.getBoundingClientRect().width; })()")
        self.assertAlmostEqual(share, timings["kv_bytes"] / timings["kv_f16_bytes"], delta=0.02)

    def test_stop_ends_the_work_on_the_server_too(self) -> None:
        self.settings(temperature=0)
        self.ask(LONG, done=False)
        self.page.wait(f"{ANSWER}.length > 40 && {BUSY}", "the answer to begin")
        self.assertEqual(self.server.busy(), 1)
        self.page.press("Escape")
        self.page.wait(IDLE, "the answer to stop", 5)
        end = time.monotonic() + 5
        while self.server.busy() > 0:
            self.assertLess(time.monotonic(), end, "the server goes on with an answer nobody reads")
            time.sleep(0.05)
        kept = self.page.run(ANSWER)
        self.assertGreater(len(kept), 40)
        self.assertIn("stopped", self.page.run("document.querySelector('#messages .answer .under').textContent"))
        # The button does the same; what has arrived was kept and goes on the next request.
        self.ask("Go on.", done=False)
        self.page.wait(f"{BUSY} && {ANSWER}.length > 5", "the second answer to begin")
        self.assertEqual(self.page.requests[-1]["messages"][1], {"role": "assistant", "content": self.page.run(CHATS)[0]["messages"][1]["content"]})
        self.page.click("#stop")
        self.page.wait(IDLE, "the second answer to stop", 5)

    def test_regenerate_asks_the_same_again(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        first = self.ask(PLANET)
        self.page.click("#messages .answer .under button:nth-of-type(2)")
        self.assertIn("Earth", first)
        self.assertIn("Earth", self.answered(1))
        self.assertEqual(len(self.page.requests), 2)
        self.assertEqual(self.page.requests[0], self.page.requests[1])
        self.assertEqual(self.page.run("document.querySelectorAll('#messages > li').length"), 2)

    def test_edit_the_last_question(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        self.ask("Say hello.")
        self.ask("What is the opposite of hot?")
        self.page.press("ArrowUp")  # in the empty field
        self.page.wait("document.activeElement.closest('.edit') !== null", "the question to open")
        self.page.run("document.activeElement.select()")
        self.page.type(PLANET)
        self.page.press("Enter")
        self.assertIn("Earth", self.answered(2))
        self.assertEqual([m["content"] for m in self.page.requests[-1]["messages"] if m["role"] == "user"], ["Say hello.", PLANET])
        self.assertEqual(len(self.page.run(CHATS)[0]["messages"]), 4)

    def test_settings_reach_the_server_and_stay(self) -> None:
        self.settings(temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, max_tokens=3, seed=7, system="You are a parrot.")
        self.ask("Hello there")
        sent = self.page.requests[-1]
        self.assertEqual(sent["messages"], [{"role": "system", "content": "You are a parrot."}, {"role": "user", "content": "Hello there"}])
        self.assertEqual({k: sent[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")},
                         {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_tokens": 3, "seed": 7})
        under = self.page.run("document.querySelector('#messages .answer .under').textContent")
        self.assertIn("3 tokens", under)
        self.assertIn("cut off", under)
        self.page.reload()
        self.page.run("document.querySelector('#settings').click()")
        self.assertEqual(self.page.run("[...document.querySelectorAll('#options :is(input, textarea)')].map((n) => n.value).join()"),
                         "You are a parrot.,0.5,0.9,20,0.1,3,7")
        # A wrong value is told by name and not taken; an empty one leaves it to the server.
        self.page.fill("#options [name=top_p]", "7")
        self.page.click("#options [type=submit]")
        told = self.page.wait("document.querySelector('#options [role=alert]:not([hidden])')?.textContent", "the complaint")
        self.assertIn("Top p: a number from 0 to 1", told)
        self.assertEqual(self.page.run("document.activeElement.name"), "top_p")
        self.page.fill("#options [name=top_p]", "")
        self.page.click("#options [type=submit]")
        self.page.wait("!document.querySelector('#options').open", "the settings to be taken")
        self.ask("Hello again")
        self.assertNotIn("top_p", self.page.requests[-1])

    def test_html_stays_text(self) -> None:
        evil = "<img src=x onerror=\"window.hacked=1\"><b>bold</b>"
        answer = (evil + "\n\n[link](javascript:window.hacked=2) **<i>x</i>** `<u>y</u>`\n\n"
                  "```html\n<script>window.hacked=3</script>\n```\n\n- <s>z</s>")
        self.substitute(stream(*answer))
        shown = self.ask(evil)
        for text in (evil, "javascript:window.hacked=2", "<i>x</i>", "<u>y</u>", "<script>window.hacked=3</script>", "<s>z</s>"):
            self.assertIn(text, shown)
        self.assertEqual(self.page.run("document.querySelector('#messages .bubble').textContent"), evil)
        self.assertEqual(self.page.run("document.querySelectorAll('#messages :is(img, b, i, u, s, script, a)').length"), 0)
        self.page.reload()
        self.assertIn(evil, self.page.run(ANSWER))
        self.assertIsNone(self.page.run("window.hacked"))

    def test_markdown(self) -> None:
        answer = ("# Head *one*\n\nSome **bold**, *slanted*, `a*b*c` and 2 * 3 * 4 or snake_case_name.\nSecond line https://example.org/a_b.\n\n"
                  "1. first\n2. second\n   - inner **x**\n   - other\n3. third\n\n```python\ndef f():\n    return '**'\n```\n\n> said\n\n"
                  "| a | b |\n|---|--:|\n| 1 | `2` |\n\n---\n\n- [x](https://example.org)\n\nEnd\n\n```\nopen")
        self.substitute(stream(*(answer[i:i + 3] for i in range(0, len(answer), 3))))
        self.ask("Show me.")
        tags = self.page.run("[...document.querySelectorAll('#messages .answer .prose *')].map((n) => n.localName).join(' ')")
        self.assertEqual(tags, "h3 em p strong em code a div ol li li ul li strong li li div div span button pre code blockquote "
                               "div table thead tr th th tbody tr td td code hr div ul li a p div div span button pre code")
        self.assertEqual(self.page.run("document.querySelector('.prose pre').textContent"), "def f():\n    return '**'")
        self.assertEqual(self.page.run("document.querySelector('.prose p').innerText"),
                         "Some bold, slanted, a*b*c and 2 * 3 * 4 or snake_case_name.\nSecond line https://example.org/a_b.")
        self.assertEqual(self.page.run("[...document.querySelectorAll('.prose a')].map((a) => a.href + ' ' + a.rel).join()"),
                         "https://example.org/a_b noopener noreferrer,https://example.org/ noopener noreferrer")
        # Long input that a careless parser would take minutes for.
        for text in (*(u * 20000 for u in ("*", "`", "_", "[", "**a", "``` `", "> ", "- ", "- a\n", "|-", "# ", "<think>")), "http://" + "." * 20000):
            self.page.run(f"(() => {{ const start = performance.now(); showProse(document.createElement('div'), {json.dumps(text)});"
                          " if (performance.now() - start > 3000) throw new Error('slow'); })()")


    def test_copy_and_scroll(self) -> None:
        answer = "\n\n".join(f"Paragraph **{i}**." for i in range(80)) + "\n\n```c\nint x;\n```"
        self.substitute(stream(*re.split("(?<= )", answer)))
        self.ask("A long one.")
        # It followed the answer; a reader who has gone up is offered the way back.
        end = "((n) => n.scrollTop + n.clientHeight >= n.scrollHeight - 2)(document.querySelector('#scroller'))"
        self.page.wait(end, "the view to follow the answer")
        self.assertTrue(self.page.run("document.querySelector('#down').hidden"))
        self.page.run("document.querySelector('#scroller').scrollTop = 0")
        self.page.wait("!document.querySelector('#down').hidden", "the button to the latest")
        self.page.click("#down")
        self.page.wait(end + " && document.querySelector('#down').hidden", "the way to the end")
        # What is copied is what the model wrote.
        self.browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        for selector, text in (("#messages .answer > .under button", answer), (".prose .code button", "int x;"),
                               ("#messages .question .under button:nth-of-type(2)", "A long one.")):
            self.page.click(selector)
            self.page.wait(f"document.querySelector({json.dumps(selector)}).textContent === 'Copied'", "the button to say so")
            self.assertEqual(self.page.run("navigator.clipboard.readText()"), text)


class Keeping(Case):
    def test_conversations_are_found_again(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        answer = self.ask(PLANET)
        self.page.click("#new")
        self.assertEqual(self.page.run("document.querySelectorAll('#messages > li').length"), 0)
        self.ask("Say hello.")
        self.page.reload()
        self.assertEqual(self.page.run("[...document.querySelectorAll('#list .open')].map((n) => n.textContent)"), ["Say hello.", PLANET])
        self.page.click("#list li:nth-child(2) .open")
        self.assertEqual(self.page.run(ANSWER), answer)
        self.page.reload()
        self.assertEqual(self.page.run("document.querySelector('#title').textContent"), PLANET, "the one that was open")
        # Rename, with keys.
        self.page.click("#list .current .tools button:nth-child(1)")
        self.page.type("Geography")
        self.page.press("Enter")
        self.assertEqual(self.page.run("document.querySelector('#title').textContent"), "Geography")
        self.assertEqual(sorted(c["title"] for c in self.page.run(CHATS)), ["Geography", "Say hello."])
        # Delete, think again, delete.
        self.page.click("#list .current .tools button:nth-child(3)")
        self.assertEqual(len(self.page.run(CHATS)), 1)
        self.page.click("#toast button")
        self.assertEqual(len(self.page.run(CHATS)), 2)
        self.assertEqual(self.page.run(ANSWER), answer)
        self.page.click("#list .current .tools button:nth-child(3)")
        self.page.reload()
        self.assertEqual(self.page.run("[...document.querySelectorAll('#list .open')].map((n) => n.textContent)"), ["Say hello."])

    def test_export_and_import(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        answer = self.ask(PLANET)
        with tempfile.TemporaryDirectory(prefix="tq_export_") as folder:
            self.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=folder)
            self.page.click("#export")
            path = os.path.join(folder, "conversations.json")
            end = time.monotonic() + 10
            # An empty file keeps the name until the download is moved over it.
            while not (os.path.exists(path) and os.path.getsize(path) > 0) and time.monotonic() < end:
                self.browser.pump(0.05)
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
            self.assertEqual([(m["role"], m["content"]) for m in saved["conversations"][0]["messages"]],
                             [("user", PLANET), ("assistant", self.page.run(CHATS)[0]["messages"][1]["content"])])
            # Into another browser.
            self.open(self.server)
            with open(os.path.join(folder, "other.json"), "w", encoding="utf-8") as file:
                file.write('{"conversations": [{"id": "a", "title": "b", "messages": [{"role": "user"}]}]}')
            for name in ("other.json", "conversations.json"):
                node = self.page.call("DOM.getDocument")["root"]["nodeId"]
                node = self.page.call("DOM.querySelector", nodeId=node, selector="#file")["nodeId"]
                self.page.call("DOM.setFileInputFiles", nodeId=node, files=[os.path.join(folder, name)])
                words = {"other.json": "holds no exported conversations", "conversations.json": "Imported 1 conversation"}[name]
                self.page.wait(f"document.querySelector('#toast').textContent.includes({json.dumps(words)})", "the outcome of " + name)
        self.page.click("#list .open")
        self.assertEqual(self.page.run(ANSWER), answer)

    def test_two_answers_at_once_go_to_their_own_conversations(self) -> None:
        self.settings(temperature=0, max_tokens=24)
        self.ask(LONG, done=False)
        self.page.wait(f"{ANSWER}.length > 5", "the first answer to begin")
        self.page.click("#new")
        self.settings(max_tokens=12)
        self.assertIn("Earth", self.ask(PLANET))
        self.page.wait("!document.querySelector('#list .busy')", "the first answer to end")
        chats = {c["title"]: c["messages"] for c in self.page.run(CHATS)}
        self.assertEqual(sorted(map(len, chats.values())), [2, 2])
        self.assertIn("Earth", chats[PLANET][1]["content"])
        self.assertEqual(chats[LONG][1]["usage"]["completion_tokens"], 24)

    def test_damaged_storage_is_left_alone(self) -> None:
        for key, text in (("tq.chat.bad", "{"), ("tq.chat.odd", '{"id":"odd","messages":[null]}'), ("tq.settings", "[")):
            self.page.run(f"localStorage[{json.dumps(key)}] = {json.dumps(text)}")
        self.page.reload()
        self.connected()
        self.assertEqual(self.page.run("localStorage['tq.chat.bad']"), "{")


class Looks(Case):
    ANSWER = ("Words, and " + "averyveryverylongwordwithoutanend" * 8 + "\n\n```\n" + "a long line of code " * 20 + "\n```\n\n" +
              "| a column | another column | a third column | and a fourth | alongcolumn |\n|---|---|---|---|---|\n| 1 | 2 | 3 | 4 | 5 |\n")

    def overlaps(self) -> list[str]:
        """Pairs of the page's parts that lie on each other, and parts that stick out of the window."""
        found: list[str] = self.page.run("""(() => {
            const scroller = document.querySelector('#scroller'), texts = '#messages > li, #gauges span, #gauges strong';
            const parts = [...document.querySelectorAll('header, #gauges, #scroller, #composer, #sidebar, h1, header button, #send, #question')]
              .concat([...document.querySelectorAll(texts)].filter((n) => n.textContent))
              .filter((n) => n.checkVisibility({ visibilityProperty: true }));
            const name = (n) => n.id || n.className || n.localName, out = [];
            const inside = (n) => n !== scroller && scroller.contains(n);
            const apart = (a, b) => a === b || a.contains(b) || b.contains(a) || inside(a) !== inside(b);
            for (const a of parts) {
              const p = a.getBoundingClientRect();
              if (p.left < -0.5 || p.right > innerWidth + 0.5) out.push(name(a) + ' is too wide');
              if (!inside(a) && p.bottom > innerHeight + 0.5) out.push(name(a) + ' is too low');
              for (const b of parts) {
                const q = b.getBoundingClientRect();
                const across = Math.min(p.right, q.right) - Math.max(p.left, q.left), down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (!apart(a, b) && across > 1 && down > 1) out.push(name(a) + ' on ' + name(b));
              }
            }
            return out;
        })()""")
        return found

    def contrasts(self) -> dict[str, float]:
        """Contrast of text to what is behind it (WCAG 2), for each kind of text that is shown."""
        found: dict[str, float] = self.page.run("""(() => {
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const rgba = (color) => {  // also of colours that are not written as rgb()
              canvas.clearRect(0, 0, 1, 1);
              canvas.fillStyle = color;
              canvas.fillRect(0, 0, 1, 1);
              return [...canvas.getImageData(0, 0, 1, 1).data];
            };
            const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const luminance = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
            const behind = (n) => {
              const color = n ? rgba(getComputedStyle(n).backgroundColor) : [255, 255, 255, 255];
              return color[3] === 255 ? color : behind(n.parentElement);
            };
            const out = {};
            for (const n of document.querySelectorAll('body *')) {
              const text = [...n.childNodes].some((c) => c.nodeType === Node.TEXT_NODE && c.data.trim());
              if (!text || !n.checkVisibility({ visibilityProperty: true }) || n.closest('.unseen, .skip, script')) continue;
              const [a, b] = [luminance(rgba(getComputedStyle(n).color)), luminance(behind(n))].sort((x, y) => y - x);
              const name = n.localName + '.' + n.className + '#' + n.id;
              out[name] = Math.min(out[name] ?? 99, (a + 0.05) / (b + 0.05));
            }
            return out;
        })()""")
        return found

    def paper(self) -> str:
        return str(self.page.run("getComputedStyle(document.body).backgroundColor"))

    def test_phone(self) -> None:
        self.page.screen(360, 740, mobile=True)
        self.page.wait("!" + SIDEBAR, "the sidebar to go")
        self.assertEqual(self.overlaps(), [])
        timings = {"predicted_per_second": 123.4, "cache_n": 900, "context_used": 131000, "context_size": 131072,
                   "kv_bytes": 123 << 30, "kv_f16_bytes": 999 << 30}
        self.substitute(stream(self.ANSWER, {"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 300}, "timings": timings}))
        self.ask("A question, and " + "aword" * 60)
        self.assertEqual(self.overlaps(), [])
        for _ in range(2):
            self.assertLessEqual(self.page.run("document.documentElement.scrollWidth"), 360)
            self.assertLessEqual(self.page.run("document.querySelector('#scroller').scrollWidth"), 360)
            self.page.run("document.querySelector('#scroller').scrollTop = 0")
        # The drawer: away until it is asked for, closed by Escape or by choosing.
        self.assertFalse(self.page.run(SIDEBAR))
        self.page.click("#menu")
        self.page.wait("document.querySelector('#sidebar').getBoundingClientRect().left === 0", "the drawer to open")
        self.assertEqual(self.page.run("document.activeElement.id"), "new")
        self.page.press("Escape")
        self.page.wait("!" + SIDEBAR, "the drawer to close")
        self.page.click("#menu")
        self.page.wait("document.querySelector('#sidebar').getBoundingClientRect().left === 0", "the drawer to open")
        self.page.click("#new")
        self.page.wait("!" + SIDEBAR, "the drawer to close")
        self.assertFalse(self.page.run("document.querySelector('#welcome').hidden"), "not a new conversation")
        # Everything to be tapped is large enough (WCAG 2.5.8), and dialogs fit.
        small = self.page.run("[...document.querySelectorAll('button, textarea')].filter((n) => n.checkVisibility({ visibilityProperty: true }) &&"
                              " n.getBoundingClientRect().height < 24).map((n) => n.textContent || n.id)")
        self.assertEqual(small, [])
        self.page.click("#settings")
        self.assertLessEqual(self.page.run("document.querySelector('#options').getBoundingClientRect().right"), 360)
        self.assertLessEqual(self.page.run("document.querySelector('#options').scrollWidth"), 360)

    def test_other_windows(self) -> None:
        self.substitute(stream(self.ANSWER))
        self.ask("Hello")
        for width, height in ((1280, 800), (800, 600), (700, 400), (320, 568), (2560, 1440)):
            self.page.screen(width, height)
            self.page.wait(SIDEBAR if width > 768 else "!" + SIDEBAR, "the sidebar to come or go")
            self.assertEqual(self.overlaps(), [], (width, height))

    def test_dark_and_light(self) -> None:
        self.substitute(stream("# Text\n\nand `code` and https://example.org\n\n```\ncode\n```\n\n> said", end=""))
        self.ask("Hello")
        papers = []
        for scheme in ("light", "dark"):
            self.page.scheme(scheme)
            papers.append(self.paper())
            self.assertEqual({k: v for k, v in self.contrasts().items() if v < 4.5}, {}, scheme)
            self.assertGreater(len(self.contrasts()), 15)
        self.assertEqual(papers, ["rgb(255, 255, 255)", "rgb(20, 23, 26)"])
        # The button wins over the system, also after a reload, until both agree again.
        self.page.click("#theme")
        self.assertEqual(self.paper(), papers[0])
        self.page.reload()
        self.assertEqual(self.paper(), papers[0])
        self.page.click("#theme")
        self.assertEqual(self.paper(), papers[1])
        self.page.scheme("light")
        self.assertEqual(self.paper(), papers[0])

    def test_keyboard_alone(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        self.page.run("document.activeElement.blur()")
        self.page.type("x")  # goes nowhere
        self.page.run("document.querySelector('#question').focus()")
        self.page.type("Name the planet")
        self.page.press("Enter", cdp.SHIFT)
        self.page.type("we live on.")
        self.assertEqual(self.page.run("document.querySelector('#question').value"), "Name the planet\nwe live on.")
        self.page.press("Enter")
        self.assertIn("Earth", self.answered(0))
        # Tab reaches everything, in both directions, and what has the focus can be seen.
        seen = []
        for _ in range(40):
            self.page.press("Tab")
            name, ring = self.page.run("(() => { const n = document.activeElement, style = getComputedStyle(n);"
                                       " const around = getComputedStyle(n.parentElement); return [n.id || n.textContent.trim(),"
                                       " n.checkVisibility() && (style.outlineStyle !== 'none' || around.boxShadow !== 'none')]; })()")
            seen.append(name)
            self.assertTrue(ring or name == self.page.run("document.body.textContent.trim()"), name)
        for name in ("new", "Rename", "Export", "Delete", "export", "import", "theme", "settings", "scroller", "Edit", "Copy", "Regenerate",
                     "question", "send"):
            self.assertIn(name, seen)
        self.assertIn("Skip to the question", seen)
        # The dialog: opened, left by Escape, the focus is back where it was.
        self.page.run("document.querySelector('#settings').focus()")
        self.page.press("Enter")
        self.page.wait("document.querySelector('#options').open && document.activeElement.name === 'system'", "the settings to open")
        self.page.press("Escape")
        self.page.wait("!document.querySelector('#options').open && document.activeElement.id === 'settings'", "the settings to close")
        # Every field and button has a name.
        nameless = self.page.run("[...document.querySelectorAll('button, input, textarea, [role=meter], [role=region], dialog')]"
                                 ".filter((n) => !(n.ariaLabel || n.getAttribute('aria-labelledby') || n.textContent.trim() ||"
                                 " n.labels?.[0]?.textContent.trim())).map((n) => n.outerHTML)")
        self.assertEqual(nameless, [])

    def test_content_security_policy(self) -> None:
        policy = next(r["headers"] for r in self.page.responses if r["url"] == self.server.address)
        policy = next((v for k, v in policy.items() if k.lower() == "content-security-policy"), "")
        self.assertRegex(policy, "default-src 'none'; script-src 'nonce-[^' ]{16,}'; style-src 'nonce-[^' ]{16,}';")
        self.assertNotEqual(self.server.get("/"), self.server.get("/"), "a nonce is good once")
        # What is not the page's own does not run.
        self.page.run("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' }))")
        self.page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=2>')")
        self.assertTrue(self.page.errors)
        self.page.errors.clear()
        self.assertIsNone(self.page.run("window.hacked"))
        text = self.server.get("/")[1].decode()
        self.assertNotIn("unsafe", policy)
        self.assertEqual(re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text), [], "nothing from elsewhere")
        self.assertEqual(re.findall(r"""<[^>]*\s(?:on[a-z]+|style)\s*=\s*["']""", text.split("<script")[0]), [])


class Trouble(Case):
    def fails_with(self, *words: str) -> None:
        text = self.page.wait(FAILURE, "words about the failure")
        for word in words:
            self.assertIn(word, text)

    def try_again(self) -> str:
        count = len(self.page.requests)
        self.page.click("#messages .failure button")
        return self.answered(count)

    def test_refusals_in_words_and_again(self) -> None:
        self.settings(temperature=0, max_tokens=12)
        trouble: list[tuple[tuple[int, dict[str, str], str], tuple[str, ...]]] = [
            (error(429, "queue full", **{"Retry-After": "7"}), ("too many questions waiting", "in 7 seconds")),
            (error(503, "the model is loading"), ("still loading", "Try again")),
            (error(503, "no room", **{"Retry-After": "1"}), ("no room", "in 1 second.")),
            (error(500, "it broke"), ("it broke",)),
            ((502, {"Content-Type": "text/html"}, "<html>bad gateway</html>"), ("HTTP 502",)),
            (stream("Half of an ans", end=""), ("connection broke", "is kept")),
            (stream("Half", {"error": {"message": "ran out of memory"}}), ("ran out of memory",)),
            (stream("Half", end="data: {nonsense\n\n"), ("not part of an answer",)),
        ]
        self.substitute(*(answer for answer, _ in trouble))
        self.ask(PLANET, done=False)
        for answer, words in trouble:
            self.fails_with(*words)
            if answer[0] == 200:
                self.assertIn("Half", self.page.run(ANSWER))
            text = self.try_again()
        self.assertIn("Earth", text)
        self.assertEqual(self.page.run(FAILURE), "")
        self.assertEqual(len(self.page.run(CHATS)[0]["messages"]), 2)
        # A new answer that fails leaves the one that was there.
        self.substitute(error(503, "no"))
        self.page.click("#messages .answer .under button:nth-of-type(2)")
        self.fails_with("no room")
        self.assertEqual(self.page.run(ANSWER), text)

    def test_question_longer_than_the_context(self) -> None:
        self.page.fill("#question", "word " * 2500)
        self.page.run("document.querySelector('#question').focus()")
        self.page.press("Enter")
        self.fails_with("The server refused", "context")
        # The server is well, and so is the page: a shorter one in its place.
        self.settings(temperature=0, max_tokens=12)
        self.page.press("Tab")
        self.page.run("document.querySelector('#question').focus()")
        self.page.press("ArrowUp")
        self.page.wait("document.activeElement.closest('.edit') !== null", "the question to open")
        self.page.fill(".edit textarea", PLANET)
        self.page.press("Enter")
        self.assertIn("Earth", self.answered(1))

    def test_key_and_a_server_that_goes(self) -> None:
        port = free_port()
        server = Server(*LEAN, "--api-key", KEY, key=KEY, port=port)
        self.addCleanup(lambda: server.close())
        self.open(server)
        dialog = "document.querySelector('#key').open"
        self.page.wait(dialog, "the page to ask for the key")
        self.page.type("wrong")
        self.page.press("Enter")
        self.page.wait(dialog + " && document.querySelector('#key-why').textContent.includes('did not accept')", "the key to be refused")
        self.page.type(KEY)
        self.page.click("#key [type=submit]")
        self.connected()
        self.page.type("caret")  # it is in the question again
        self.assertEqual(self.page.run("document.querySelector('#question').value"), "caret")
        self.page.fill("#question", "")
        self.settings(temperature=0, max_tokens=12)
        answer = self.ask(PLANET)
        self.assertIn("Earth", answer)
        self.page.reload()
        self.connected()
        self.assertNotIn(KEY, self.page.run("JSON.stringify(localStorage)"))
        # The server goes, the question is kept, the server comes back.
        server.close()
        self.ask("Say hello.", done=False)
        self.fails_with(f"127.0.0.1:{port} does not answer")
        server = Server(*LEAN, "--api-key", KEY, key=KEY, port=port)
        self.assertGreater(len(self.try_again()), 1)
        self.assertEqual([m["content"] for m in self.page.requests[-1]["messages"] if m["role"] == "user"], [PLANET, "Say hello."])


def shared_server(kept: list[Server] = []) -> Server:
    if not kept:
        kept.append(Server(*LEAN))
        unittest.addModuleCleanup(kept[0].close)
    kept[0].wait_ready()
    return kept[0]


def shared_page(kept: list[cdp.Page] = []) -> cdp.Page:
    if not kept:
        browser = cdp.Browser(cdp.find_chromium() or "")
        unittest.addModuleCleanup(browser.close)
        kept.append(browser.page())
    return kept[0]


# What stands for the system's font in pictures, so that they look the same wherever they are made.
FONTS = "<fontconfig><include>/etc/fonts/fonts.conf</include>" + "".join(
    f'<match><test name="family" qual="first"><string>{name}</string></test><edit name="family" mode="prepend" binding="strong">'
    f"<string>Inter</string><string>Liberation Sans</string></edit></match>" for name in ("system-ui", "sans-serif", "DejaVu Sans")) + "</fontconfig>"


def screenshots(folder: str) -> None:
    """The pictures of docs/serve.md: real questions, answered by the model. Looks best where Debian's fonts-inter is installed."""
    os.makedirs(folder, exist_ok=True)
    server = Server("--threads", os.cpu_count())
    unittest.addModuleCleanup(server.close)
    with open(os.path.join(server.folder, "fonts.conf"), "w", encoding="utf-8") as file:
        file.write(FONTS)
    os.environ["FONTCONFIG_FILE"] = file.name
    case = Chat()
    case.server, case.page = server, shared_page()
    case.browser = case.page.browser
    case.open(server)
    case.connected()
    case.settings(temperature=0, max_tokens=300)

    def shoot(name: str, scheme: str, *screen: Any) -> None:
        case.page.scheme(scheme)
        case.page.screen(*screen)
        case.page.run("document.activeElement.blur(), document.querySelector('#scroller').scrollTop = 0")
        case.page.run("Promise.all(document.getAnimations().map((a) => a.finished)).then(() => new Promise(requestAnimationFrame))")
        case.page.screenshot(os.path.join(folder, name + ".png"))

    shoot("page-start", "light", 1200, 800)
    for conversation in (("Why is the sky blue?",), ("Name three uses of a compass.",), (PLANET, "What is photosynthesis?")):
        case.page.click("#new")
        for question in conversation:
            print(f"{question}\n{case.ask(question)}\n{case.page.run('document.querySelector(`#gauges`).innerText')}\n")
    shoot("page", "light", 1200, 800)
    shoot("page-dark", "dark", 1200, 800)
    shoot("page-phone", "light", 360, 740, True, 2)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("tq")
    arguments.add_argument("tests", nargs="*")
    arguments.add_argument("--screenshots")
    given = arguments.parse_args()
    if not MODEL or not cdp.find_chromium():
        print("SKIPPED: " + ("no Chromium (Debian package chromium)" if MODEL else "TQ_TEST_SMOLLM2 is not set"))
        return 77
    if given.screenshots:
        try:
            screenshots(given.screenshots)
        finally:
            unittest.doModuleCleanups()
        return 0
    loader = unittest.defaultTestLoader
    tests = loader.loadTestsFromNames(given.tests, sys.modules[__name__]) if given.tests else loader.loadTestsFromModule(sys.modules[__name__])
    return 0 if unittest.TextTestRunner(verbosity=2).run(tests).wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
