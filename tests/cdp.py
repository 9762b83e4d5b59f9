"""A headless Chromium driven over the DevTools protocol, for tests of web pages. Standard library only.

The browser is spoken to through a pair of pipes (--remote-debugging-pipe: JSON messages ending in NUL), so there is no port to
find. All waiting is polling with a deadline. A Browser is used by one thread.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any, Callable, Optional

# Longest wait for anything, in seconds: much more than a busy machine with two cores needs. CDP_PATIENCE= changes it.
PATIENCE = float(os.environ.get("CDP_PATIENCE", "60"))

KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), "Space": (" ", 32, " "), "Backspace": ("Backspace", 8, ""),
    "ArrowUp": ("ArrowUp", 38, ""), "ArrowDown": ("ArrowDown", 40, ""), "Delete": ("Delete", 46, ""),
}
SHIFT, CONTROL = 8, 2


def find_chromium() -> Optional[str]:
    """CHROMIUM, else what the path has; None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class BrowserError(Exception):
    pass


class Browser:
    def __init__(self, program: str):
        self.folder = tempfile.TemporaryDirectory(prefix="tq_browser_", ignore_cleanup_errors=True)
        command = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}/profile", "--no-first-run",
                   "--no-default-browser-check", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio", "--hide-scrollbars",
                   "--force-color-profile=srgb"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to be root with it
        to_read, self.to = os.pipe()
        self.source, from_write = os.pipe()

        def pipes() -> None:  # commands on 3, answers on 4
            to_high, from_high = os.dup(to_read), os.dup(from_write)
            os.dup2(to_high, 3)
            os.dup2(from_high, 4)

        self.log = open(os.path.join(self.folder.name, "log"), "wb")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, close_fds=False,
                                        preexec_fn=pipes, start_new_session=True, env={**os.environ, "HOME": self.folder.name})
        os.close(to_read)
        os.close(from_write)
        self.last_id = 0
        self.rest = b""
        self.answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}
        self.call("Browser.getVersion")

    def send(self, method: str, session: Optional[str] = None, **parameters: Any) -> int:
        """Sends a command and does not wait; its answer is dropped if it is nobody's."""
        self.last_id += 1
        message: dict[str, Any] = {"id": self.last_id, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data):]
        return self.last_id

    def call(self, method: str, session: Optional[str] = None, **parameters: Any) -> dict[str, Any]:
        number = self.send(method, session, **parameters)
        end = time.monotonic() + PATIENCE
        while number not in self.answers:
            if time.monotonic() > end:
                raise BrowserError(f"no answer to {method} in {PATIENCE} s")
            self.pump(0.2)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def pump(self, seconds: float) -> None:
        """Takes in what the browser has sent, waiting at most that long for something."""
        if not select.select([self.source], [], [], seconds)[0]:
            return
        data = os.read(self.source, 1 << 20)
        if not data:
            self.log.flush()
            with open(self.log.name, encoding="utf-8", errors="replace") as file:
                raise BrowserError("the browser ended:\n" + file.read()[-2000:])
        *messages, self.rest = (self.rest + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self.answers[message["id"]] = message
                if len(self.answers) > 1000:
                    self.answers.pop(min(self.answers))
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].event(message["method"], message["params"])

    def page(self) -> Page:
        """The tab that the browser starts with."""
        target = next(t["targetId"] for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.pages[session] = Page(self, session)
        self.pages[session].prepare()
        return self.pages[session]

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            pass
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # a group of its own, with all its helpers
            self.process.wait(10)
        os.close(self.to)
        os.close(self.source)
        self.log.close()
        self.folder.cleanup()


class Page:
    """One tab. errors: what its console complained about, requests: bodies of its POSTs, in order."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session
        self.errors: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.responses: list[dict[str, Any]] = []
        self.substitute: Optional[Callable[[str], Optional[tuple[int, dict[str, str], str]]]] = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def prepare(self) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def event(self, method: str, p: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = p["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and p["type"] == "error":
            self.errors.append(" ".join(str(a.get("description") or a.get("value")) for a in p["args"]))
        elif method == "Log.entryAdded" and p["entry"]["level"] == "error" and p["entry"]["source"] != "network":
            self.errors.append(p["entry"]["text"])
        elif method == "Network.requestWillBeSent" and p["request"]["method"] == "POST":
            self.requests.append(json.loads(p["request"].get("postData") or "{}"))
        elif method == "Network.responseReceived":
            self.responses.append(p["response"])
        elif method == "Fetch.requestPaused":
            answer = self.substitute(p["request"]["url"]) if self.substitute else None
            if answer is None:
                self.browser.send("Fetch.continueRequest", self.session, requestId=p["requestId"])
                return
            status, headers, body = answer
            self.browser.send("Fetch.fulfillRequest", self.session, requestId=p["requestId"], responseCode=status,
                              responseHeaders=[{"name": n, "value": v} for n, v in headers.items()],
                              body=base64.b64encode(body.encode()).decode())

    def answer_with(self, function: Optional[Callable[[str], Optional[tuple[int, dict[str, str], str]]]]) -> None:
        """From now on function(address) answers requests in the server's place: (status, headers, body), or None: the server."""
        self.substitute = function
        if function:
            self.call("Fetch.enable")
        else:
            self.call("Fetch.disable")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(address)})", "the page to load")

    def forget(self) -> None:
        """Leaves the page and forgets what its site has stored, and what was noted here."""
        if (origin := self.run("location.origin")) != "null":
            self.run("sessionStorage.clear()")
            self.open("about:blank")
            self.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.errors, self.requests, self.responses = [], [], []

    def reload(self) -> None:
        self.run("window.before_reload = true")
        self.call("Page.reload")
        self.wait("!window.before_reload && document.readyState === 'complete'", "the page to load again")

    def run(self, script: str, gesture: bool = False) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=gesture)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(f"{script}: {details.get('exception', {}).get('description') or details['text']}")
        return result["result"].get("value")

    def wait(self, script: str, what: str, seconds: float = PATIENCE) -> Any:
        """Polls until the expression is true; returns its value. While a page is replaced there is nothing to ask, which is not an error."""
        end = time.monotonic() + seconds
        trouble = ""
        while True:
            try:
                value = self.run(script)
                if value:
                    return value
            except BrowserError as error:
                trouble = f" ({error})"
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds:.0f} s for {what}: {script}{trouble}")
            self.browser.pump(0.05)

    def press(self, key: str, modifiers: int = 0) -> None:
        name, code, text = KEYS[key]
        common: dict[str, Any] = {"key": name, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """One key after the other, into what has the focus."""
        for character in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=character, key=character)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def insert(self, text: str) -> None:
        """All at once, as an input method or a paste does, into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A real press of the mouse in the middle of the element."""
        x, y = self.run(f"(() => {{ const n = document.querySelector({json.dumps(selector)}); n.scrollIntoView({{ block: 'nearest' }});"
                        " const r = n.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def fill(self, selector: str, value: str) -> None:
        """Sets a field's value at once and tells the page, as a paste would."""
        self.run(f"(() => {{ const n = document.querySelector({json.dumps(selector)}); n.value = {json.dumps(value)};"
                 " for (const kind of ['input', 'change']) n.dispatchEvent(new Event(kind, { bubbles: true })); })()")

    def screen(self, width: int, height: int, mobile: bool = False, scale: float = 1) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)

    def scheme(self, name: str) -> None:
        """light or dark, as the system would say."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
