"""sample_text.py prose|code FOLDER: a long plain text for `tq eval` and `tq tune`, taken from what set-up installs.

prose: the Debian Administrator's Handbook in English (Debian package debian-handbook), HTML stripped, in book order.
code: the modules of Python's standard library.
The file is named after what it was made of, so it is made once; prints "result FILE", or one line that says what failed.
"""
import hashlib
import os
import pathlib
import re
import sys
import sysconfig
from html.parser import HTMLParser

HANDBOOK = pathlib.Path("/usr/share/doc/debian-handbook/html/en-US")
# Raise it when the text that is made of the same sources changes.
RECIPE = 1


class Text(HTMLParser):
    """What a reader sees of a page, one paragraph a line; the links of its table of contents."""

    HIDDEN = {"script", "style", "head"}
    BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "tr", "pre", "ul", "ol", "table", "br"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.lines, self.words, self.links = [], [], []
        self.hidden = self.verbatim = self.navigation = 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag in self.HIDDEN:
            self.hidden += 1
        # The rows of arrows above and below every page.
        if tag == "ul" and "docnav" in attributes.get("class", "") or tag == "ul" and self.navigation:
            self.navigation += 1
        if tag in self.BLOCKS:
            self.end_line()
        self.verbatim += tag == "pre"

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self.end_line()
        if tag in self.HIDDEN:
            self.hidden -= 1
        if tag == "ul" and self.navigation:
            self.navigation -= 1
        self.verbatim -= tag == "pre"

    def handle_data(self, data):
        if not self.hidden and not self.navigation:
            self.words.append(data)

    def end_line(self):
        text = "".join(self.words)
        self.words = []
        text = text.strip("\n") if self.verbatim else re.sub(r"\s+", " ", text).strip()
        if text.strip():
            self.lines.append(text)


def parse(path):
    page = Text()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    page.end_line()
    return page


def prose_sources():
    if not (HANDBOOK / "index.html").is_file():
        sys.exit("--text prose: Debian's package debian-handbook is not installed; run scripts/setup test or apt-get install "
                 "debian-handbook, or name a text with --file")
    pages = [link.split("#")[0] for link in parse(HANDBOOK / "index.html").links]
    return [HANDBOOK / page for page in dict.fromkeys(pages) if page.endswith(".html") and (HANDBOOK / page).is_file()]


def prose(sources):
    seen = set()
    for path in sources:
        for line in parse(path).lines:
            # Headings and captions that every page repeats.
            if len(line) < 80 and line in seen:
                continue
            seen.add(line)
            yield line + "\n"


def code_sources():
    sources = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not sources:
        sys.exit(f"--text code: {sys.executable} has no standard library sources; name another Python in TQ_PYTHON, or a "
                 f"text with --file")
    return sources


def code(sources):
    for path in sources:
        yield path.read_text(encoding="utf-8", errors="replace") + "\n"


def main():
    kinds = {"prose": (prose_sources, prose), "code": (code_sources, code)}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        sys.exit("usage: sample_text.py prose|code FOLDER")
    find, make = kinds[sys.argv[1]]
    sources = find()
    facts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources]
    key = hashlib.sha256("\n".join([str(RECIPE), *facts]).encode()).hexdigest()[:12]
    target = pathlib.Path(sys.argv[2]) / f"{sys.argv[1]}-{key}.txt"
    if not target.is_file():
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text("".join(make(sources)), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    print(f"result {target}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; free some room or correct its permissions")
