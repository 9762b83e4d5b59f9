"use strict";

// ---- Small tools

const $ = (id) => document.getElementById(id);

/** An element with properties (or attributes, where there is no such property) and children. Strings become text, never markup. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const button = (text, onclick, className = "text") => el("button", { type: "button", textContent: text, className, onclick });
const count = (n) => Number(n).toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Bytes as tq prints them: powers of 1024. */
function size(bytes) {
  let unit = 0;
  bytes = Number(bytes);
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  return `${bytes.toFixed(unit === 0 || bytes >= 100 ? 0 : 1)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

let undo = null;
function toast(text, action = null) {
  undo = action;
  $("toast").firstElementChild.textContent = text;
  $("toast").lastElementChild.hidden = action === null;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $("toast").hidden = true; }, action ? 10000 : 5000);
}
const say = (text) => { $("status").textContent = text; };  // to screen readers

// ---- What the browser keeps: tq.settings, tq.theme, and tq.chat.<id> for each conversation, so that two tabs do not overwrite each other

const memory = new Map();  // when the browser refuses to keep anything, until the tab is closed
function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key) ?? memory.get(key) ?? "null");
  } catch {
    return null;  // not ours, or damaged: left where it is
  }
}
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    memory.delete(key);
  } catch {
    memory.set(key, JSON.stringify(value));
    toast("The browser cannot store this conversation. Export it, or delete older ones.");
  }
}

/** A conversation: { id, title, system, updated, messages: [{ role, content, finish?, speed?, usage?, timings? }] }. An answer without finish
    was stopped or broke off. */
function validChat(chat) {
  return chat && typeof chat.id === "string" && typeof chat.title === "string" && Array.isArray(chat.messages) &&
    chat.messages.every((m) => m && (m.role === "user" || m.role === "assistant") && typeof m.content === "string");
}
const chats = new Map();
function loadChats() {
  let keys = [];
  try { keys = Object.keys(localStorage); } catch { /* not allowed: this tab only */ }
  for (const chat of keys.filter((k) => k.startsWith("tq.chat.")).map(read)) if (validChat(chat)) chats.set(chat.id, chat);
}
function save(chat) {
  if (!chats.has(chat.id) && chat.messages.length === 0) return;  // a new one is kept from its first question on
  chats.set(chat.id, chat);
  write("tq.chat." + chat.id, chat);
}
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
const newChat = () => ({ id: newId(), title: "New conversation", system: settings.system, updated: Date.now(), messages: [] });

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const settings = { system: "", ...read("tq.settings") };

// ---- Markdown: a small safe part of it. Text is cut into blocks, and only blocks that changed are built again while an answer streams

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DASHES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function blocks(text) {
  const found = [];
  let block = null, blank = false;
  const start = (kind, more = {}) => { block = { kind, lines: [], ...more }; found.push(block); };
  if (/^\s*<think>/.test(text)) {  // reasoning models
    const [thought, ...rest] = text.replace(/^\s*<think>\s*/, "").split("</think>");
    if (thought.trim()) found.push({ kind: "thought", lines: [thought.trim()] });
    text = rest.join("</think>");
  }
  const lines = text.split("\n");
  lines.forEach((line, at) => {
    let m;
    if (block?.kind === "code") {
      const end = line.trim();
      if (end.startsWith(block.fence) && /^(`+|~+)$/.test(end)) block = null;
      else block.lines.push(line.startsWith(block.indent) ? line.slice(block.indent.length) : line.trimStart());
    } else if ((m = /^(\s*)(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/.exec(line))) {
      start("code", { indent: m[1], fence: m[2], language: m[3] });
    } else if (!line.trim()) {
      if (block?.kind !== "list") block = null;
      blank = true;
      return;
    } else if ((m = /^ {0,3}(#{1,6}) +(.*)$/.exec(line))) {
      start("heading", { level: m[1].length });
      block.lines.push(m[2].replace(/\s#+$/, ""));
      block = null;
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      start("rule");
      block = null;
    } else if (ITEM.test(line) || (block?.kind === "list" && (!blank || /^\s/.test(line)))) {
      if (block?.kind !== "list") start("list");
      block.lines.push(line);
    } else if ((m = /^ {0,3}> ?(.*)$/.exec(line))) {
      if (block?.kind !== "quote") start("quote");
      block.lines.push(m[1]);
    } else if (block?.kind === "table" || (line.includes("|") && lines[at + 1]?.includes("|") && DASHES.test(lines[at + 1]))) {
      if (block?.kind !== "table") start("table");
      block.lines.push(line);
    } else {
      if (block?.kind !== "text") start("text");
      block.lines.push(line);
    }
    blank = false;
  });
  return found;
}

function build(block) {
  const text = block.lines.join("\n");
  switch (block.kind) {
  case "code":
    return el("div", { className: "code" }, el("div", {}, el("span", { className: "small" }, block.language || "code"), copyButton(text)),
      el("pre", { tabIndex: 0 }, el("code", {}, text)));
  case "heading": return el("h3", { className: block.level < 3 ? "top" : "" }, ...inline(text));
  case "rule": return el("hr");
  case "list": return list(block.lines);
  case "quote": return el("blockquote", {}, ...inline(text));
  case "table": return table(block.lines);
  case "thought": return el("details", {}, el("summary", {}, "Thoughts"), text);
  default: return el("p", {}, ...inline(text));
  }
}

/** Items nest by their indentation. Other lines go on with the item before them. */
function list(lines) {
  const items = [], root = el("div", { className: "list" }), open = [];
  for (const line of lines) {
    const m = ITEM.exec(line);
    if (m) items.push({ indent: m[1].replace(/\t/g, "    ").length, ordered: /\d/.test(m[2]), number: parseInt(m[2], 10), text: m[3] });
    else items.at(-1).text += "\n" + line.trim();
  }
  for (const item of items) {
    while (open.length > 1 && item.indent < open.at(-1).indent) open.pop();
    const deeper = open.length > 0 && item.indent > open.at(-1).indent + 1;
    if (open.length && !deeper && open.at(-1).ordered !== item.ordered) open.pop();
    if (!open.length || deeper || open.at(-1).indent + 1 < item.indent) {
      const parent = open.length ? open.at(-1).node.lastElementChild : root;
      const node = el(item.ordered ? "ol" : "ul", item.ordered ? { start: item.number } : {});
      parent.append(node);
      open.push({ ...item, node });
    }
    open.at(-1).node.append(el("li", {}, ...inline(item.text)));
  }
  return root;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell))));
  return el("div", { className: "table", tabIndex: 0 },
    el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

// Lengths are bounded so that no text makes the search slow.
const INLINE = new RegExp([
  /\\([\\`*_{}[\]()#+.!|>-])/,                                                  // 1 escaped
  /(?<!`)(`{1,8})(?!`)([^]{0,2000}?[^`])\2(?!`)/,                               // 2, 3 code
  /\*\*(?=\S)([^]{1,2000}?\S?)\*\*(?!\*)|(?<!\w)__(?=\S)([^]{1,2000}?)__(?!\w)/,  // 4, 5 bold
  /(?<![\w*])\*(?![\s*])([^*\n]{1,500}?)(?<!\s)\*(?![\w*])|(?<!\w)_(?![\s_])([^_\n]{1,500}?)(?<!\s)_(?!\w)/,  // 6, 7 italic
  /\[([^[\]\n]{1,500})\]\((https?:\/\/[^\s<>()]{1,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200})?)\)/,      // 8, 9 link
  /\b(https?:\/\/[^\s<>()"'`]{0,2000}[^\s<>()"'`.,;:!?*_])/,                    // 10 address
].map((r) => r.source).join("|"), "g");

/** Text with its inline marks, as nodes. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const m of text.matchAll(INLINE)) {
    if (m.index > end) nodes.push(text.slice(end, m.index));
    end = m.index + m[0].length;
    const bold = m[4] ?? m[5], italic = m[6] ?? m[7], address = m[9] ?? m[10];
    if (m[1]) nodes.push(m[1]);
    else if (m[2]) nodes.push(el("code", {}, m[3].replace(/^ ([^]*[^ ][^]*) $/, "$1")));
    else if (bold) nodes.push(el("strong", {}, ...inline(bold)));
    else if (italic) nodes.push(el("em", {}, ...inline(italic)));
    else if (address) nodes.push(el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, m[8] ?? address));
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** Makes node show text; children whose block is unchanged stay, with the reader's selection in them. */
function showProse(node, text) {
  const wanted = blocks(text);
  wanted.forEach((block, i) => {
    const source = JSON.stringify(block), old = node.children[i];
    if (old?.source === source) return;
    const made = build(block);
    made.source = source;
    if (old) old.replaceWith(made); else node.append(made);
  });
  while (node.children.length > wanted.length) node.lastElementChild.remove();
}

// ---- The server

/** What went wrong, in words for the reader. */
class Failure extends Error {}

let props = null;  // GET /props, once the server has answered it
const key = () => { try { return sessionStorage.getItem("tq.key") ?? key.kept; } catch { return key.kept; } };
function keepKey(text) {
  key.kept = text;
  try { sessionStorage.setItem("tq.key", text); } catch { /* kept until the page is left */ }
}

/** fetch() with the key; asks for one when the server wants it. Throws Failure. */
async function request(path, options = {}) {
  for (;;) {
    const used = key();
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...options.headers, ...(used ? { Authorization: "Bearer " + used } : {}) } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(`The server at ${location.host} does not answer. Is tq serve still running?`);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (used === key() && !await askKey(used ? "The server did not accept the key that was given." : "It was started with --api-key."))
      throw Object.assign(new Failure("The server needs an API key."), { declined: true });
    options.signal?.throwIfAborted();
  }
}

async function refusal(response) {
  let said = "";
  try { said = (await response.json()).error?.message ?? ""; } catch { /* not JSON: a proxy's page */ }
  const wait = parseInt(response.headers.get("Retry-After"), 10);
  const later = wait > 0 ? ` Try again in ${plural(wait, "second")}.` : " Try again in a moment.";
  if (response.status === 429) return new Failure("The server has too many questions waiting." + later);
  if (response.status === 503 && /load/i.test(said)) return new Failure("The server is still loading its model." + later);
  if (response.status === 503) return new Failure("The server has no room for this question now." + later);
  if (response.status === 413) return new Failure("The question is larger than the server accepts." + (said ? " It says: " + said : ""));
  return new Failure(said ? "The server refused: " + said : `The server answered with an error (HTTP ${response.status}).`);
}

/** The JSON of each event of an event stream. Returns at [DONE]; throws Failure where the stream ends before that. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      piece = { done: true };
    }
    if (piece.done) throw new Failure("The connection broke in the middle of the answer. What had arrived is kept.");
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (let line of lines) {
      line = line.replace(/\r$/, "");
      if (line.startsWith("data:")) data += (data ? "\n" : "") + line.slice(5).replace(/^ /, "");
      if (line !== "" || data === "") continue;
      if (data === "[DONE]") return;
      let event;
      try {
        event = JSON.parse(data);
      } catch {
        throw new Failure("The server sent something that is not part of an answer. What had arrived is kept.");
      }
      data = "";
      if (event.error) throw new Failure("The server ended the answer: " + (event.error.message ?? "it did not say why."));
      yield event;
    }
  }
}

async function connect() {
  clearTimeout(connect.timer);
  try {
    props = await (await request("props")).json();
    $("model").textContent = [props.model?.id, props.kv?.choice && "KV " + props.kv.choice].filter(Boolean).join(", ");
  } catch (error) {
    $("model").textContent = error.message;
    if (error.declined) return;  // asked for again with the next question
    connect.timer = setTimeout(connect, 1500);
  }
  showWelcome();
  showGauges();
}

// ---- Answers. A run is an answer on its way: one a conversation, several conversations at once

const runs = new Map();      // conversation's id -> { abort, message, node, started, pieces }
const failures = new Map();  // conversation's id -> words

/** Asks for an answer to the conversation's last question. previous: the answer to put back if nothing comes. */
async function answer(chat, previous = null) {
  const message = { role: "assistant", content: "" };
  const run = { abort: new AbortController(), message, node: null, started: 0, pieces: 0 };
  const messages = chat.messages.map(({ role, content }) => ({ role, content }));
  const body = { model: props?.model?.id, messages, stream: true, stream_options: { include_usage: true } };
  if (chat.system) messages.unshift({ role: "system", content: chat.system });
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) body[name] = settings[name];
  failures.delete(chat.id);
  runs.set(chat.id, run);
  chat.messages.push(message);
  refresh(chat);
  scrollDown();
  say("Waiting for the answer");
  let saved = performance.now();
  try {
    const response = await request("v1/chat/completions", { method: "POST", signal: run.abort.signal,
      headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!props) connect();
    for await (const event of events(response)) {
      const choice = event.choices?.[0];
      if (choice?.delta?.content) {
        run.started ||= performance.now();
        run.pieces += 1;
        message.content += choice.delta.content;
        draw(chat, run);
        if (performance.now() - saved > 1000) { saved = performance.now(); save(chat); }
      }
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (event.usage) message.usage = event.usage;
      if (event.timings) message.timings = event.timings;
    }
  } catch (error) {
    if (error instanceof Failure) {
      failures.set(chat.id, error.message);
    } else if (!run.abort.signal.aborted) {
      console.error(error);
      failures.set(chat.id, "The page met an error of its own: " + error.message);
    }
  }
  runs.delete(chat.id);
  if (run.pieces > 1) message.speed = 1000 * (run.pieces - 1) / (performance.now() - run.started);
  if (message.content === "" && !message.finish) {  // nothing came
    chat.messages.pop();
    if (previous) chat.messages.push(previous);
  }
  chat.updated = Date.now();
  if (chats.has(chat.id)) save(chat);
  refresh(chat);
  say(failures.get(chat.id) ?? (!message.finish ? "Stopped" : "Answer: " + message.content));
}

function ask(text) {
  const chat = current;
  if (!text.trim() || runs.has(chat.id)) return false;
  if (chat.messages.length === 0 && chat.title === "New conversation") chat.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
  if (chat.messages.at(-1)?.role === "user") chat.messages.at(-1).content += "\n\n" + text;  // roles alternate; the last had no answer
  else chat.messages.push({ role: "user", content: text });
  chat.updated = Date.now();
  editing = false;
  save(chat);
  answer(chat);
  return true;
}

function regenerate(chat = current) {
  if (runs.has(chat.id)) return;
  const previous = chat.messages.at(-1)?.role === "assistant" ? chat.messages.pop() : null;
  if (chat.messages.length) answer(chat, previous);
  focusQuestion();
}

function stop(chat = current) {
  runs.get(chat.id)?.abort.abort();
  focusQuestion();
}

// ---- What is shown

let current;            // the open conversation
let editing = false;    // its last question
let renaming = null;    // the conversation whose title is being edited

/** Shows a conversation's new state, if it is the open one. */
function refresh(chat) {
  keepFocus($("list"), showList);
  if (chat !== current) return;
  const follow = atEnd();
  keepFocus($("messages"), showChat);
  if (follow) scrollDown();
}

/** Runs what builds a part of the page anew; the button that had the focus is found again by its place. */
function keepFocus(part, build) {
  const at = [...part.querySelectorAll("button")].indexOf(document.activeElement);
  build();
  if (at >= 0) (part.querySelectorAll("button")[at] ?? $("question")).focus({ preventScroll: true });
}

function showList() {
  if (renaming && $("list").querySelector("input")) return;  // a title is being typed
  const ordered = [...chats.values()].sort((a, b) => b.updated - a.updated);
  $("list").replaceChildren(...ordered.map((chat) => {
    const item = el("li", { className: (chat === current ? "current " : "") + (runs.has(chat.id) ? "busy" : "") });
    if (chat === renaming) {
      const input = el("input", { value: chat.title, maxLength: 200, ariaLabel: "Title of the conversation" });
      const done = (keep) => {
        if (renaming !== chat) return;
        renaming = null;
        if (keep && input.value.trim()) { chat.title = input.value.trim(); save(chat); }
        refresh(chat);
        $("list").querySelector(".current .open")?.focus();
      };
      input.onblur = () => setTimeout(() => done(true), 200);  // after the click that took the focus has arrived
      input.onkeydown = (e) => {
        if (e.isComposing || (e.key !== "Enter" && e.key !== "Escape")) return;
        e.stopPropagation();
        done(e.key === "Enter");
      };
      item.append(input);
      return item;
    }
    const open = button(chat.title, () => { openChat(chat); drawer(false); focusQuestion(); }, "open");
    if (chat === current) open.setAttribute("aria-current", "true");
    item.append(open);
    if (chat === current) {
      item.append(el("div", { className: "tools" },
        button("Rename", () => { renaming = chat; showList(); const input = $("list").querySelector("input"); input.focus(); input.select(); }),
        button("Export", () => download([chat], `conversation-${chat.id}.json`)), button("Delete", () => remove(chat))));
    }
    return item;
  }));
  $("export").disabled = chats.size === 0;
}

function showChat() {
  const run = runs.get(current.id), last = current.messages.length - 1;
  history.replaceState(null, "", chats.has(current.id) ? "#" + current.id : location.pathname + location.search);  // for a reload
  $("title").textContent = current.title;
  document.title = current.messages.length ? `${current.title} – turboquant` : "turboquant";
  $("messages").replaceChildren(...current.messages.map((message, i) => {
    const late = i >= last - 1;
    if (message.role === "user") return showQuestion(message, late, i >= last - 1 && !run);
    return showAnswer(message, late, i === last, run?.message === message ? run : null);
  }));
  const failed = failures.get(current.id) ?? (!run && current.messages.at(-1)?.role === "user" ? "This question has no answer yet." : null);
  if (failed) {
    $("messages").append(el("li", { className: "failure" }, el("p", { role: "alert" }, failed),
      el("div", {}, button("Try again", () => regenerate(), ""))));
  }
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  showWelcome();
  showGauges();
}

function showQuestion(message, late, changeable) {
  const item = el("li", { className: "question" + (late ? " late" : "") }, el("h2", { className: "unseen" }, "You"));
  if (changeable && editing) {
    const rows = Math.min(12, message.content.split("\n").length + 1);
    const text = el("textarea", { value: message.content, rows, ariaLabel: "Edit the question", dir: "auto" });
    const leave = () => { editing = false; showChat(); focusQuestion(); };
    const send = () => {
      if (!text.value.trim()) return;
      editing = false;
      message.content = text.value;
      current.messages.length = current.messages.indexOf(message) + 1;
      save(current);
      answer(current);
      focusQuestion();
    };
    text.onkeydown = (e) => {
      if (e.key === "Escape") { e.stopPropagation(); leave(); }
      if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); }
    };
    item.append(el("div", { className: "edit" }, text, el("div", {}, button("Cancel", leave, ""), button("Send", send, "primary"))));
    return item;
  }
  item.append(el("div", { className: "bubble", dir: "auto" }, message.content),
    el("div", { className: "under" }, ...(changeable ? [button("Edit", edit)] : []), copyButton(message.content)));
  return item;
}

function showAnswer(message, late, last, run) {
  const prose = el("div", { className: "prose" + (run ? " streaming" : ""), dir: "auto" });
  const item = el("li", { className: "answer" + (late ? " late" : "") }, el("h2", { className: "unseen" }, "Answer"), prose);
  if (message.content) showProse(prose, message.content);
  else prose.append(el("p", { className: "waiting" }, run ? "Reading the question" : "The model answered with nothing."));
  if (run) {
    run.node = prose;
    return item;
  }
  const facts = [];
  if (message.usage) {
    facts.push(plural(message.usage.completion_tokens, "token"));
    if (message.timings?.cache_n) facts.push(`${count(message.timings.cache_n)} of ${count(message.usage.prompt_tokens)} prompt tokens reused`);
  }
  if (!message.finish) facts.push("stopped");
  if (message.finish === "length") facts.push("cut off at the token limit");
  item.append(el("div", { className: "under" }, copyButton(message.content), ...(last ? [button("Regenerate", () => regenerate())] : []),
    el("span", { className: "small" }, facts.join(", "))));
  return item;
}

function edit() {
  if (runs.has(current.id) || !current.messages.length) return;
  editing = true;
  showChat();
  const text = $("messages").querySelector(".edit textarea");
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
}

/** The streaming answer, at most once a frame. */
function draw(chat, run) {
  if (run.drawn || chat !== current) return;
  run.drawn = true;
  requestAnimationFrame(() => {
    run.drawn = false;
    if (chat !== current || runs.get(chat.id) !== run) return;
    const follow = atEnd();
    showProse(run.node, run.message.content);
    if (run.pieces > 4) $("speed").textContent = `about ${(1000 * (run.pieces - 1) / (performance.now() - run.started)).toFixed(1)} tok/s`;
    if (follow) scrollDown();
  });
}

/** The memory of the open conversation, as its last answer told it. */
function showGauges() {
  const told = current.messages.findLast((m) => m.timings), t = told?.timings ?? {}, last = current.messages.findLast((m) => m.role === "assistant");
  $("gauges").hidden = current.messages.length === 0;
  const known = t.kv_bytes > 0 && t.kv_f16_bytes > 0, share = known ? Math.min(1, t.kv_bytes / t.kv_f16_bytes) : 0;
  $("kv").textContent = known ? size(t.kv_bytes) : "–";
  $("kv-f16").textContent = known ? `f16 would take ${size(t.kv_f16_bytes)}` : "known when an answer is complete";
  $("kv-times").textContent = known && share < 0.995 ? `${(1 / share).toFixed(1)}× smaller` : "";
  $("kv-bar").firstElementChild.style.width = `${100 * share}%`;
  $("kv-bar").setAttribute("aria-valuenow", Math.round(100 * share));
  $("kv-bar").setAttribute("aria-valuetext", known ? `${size(t.kv_bytes)}, f16 would take ${size(t.kv_f16_bytes)}` : "not known yet");
  const whole = t.context_size ?? props?.context?.per_slot;
  $("context").textContent = whole ? `Context ${t.context_used === undefined ? "" : count(t.context_used) + " of "}${count(whole)} tokens` : "";
  const exact = last?.timings?.predicted_per_second;
  $("speed").textContent = exact ? `${Number(exact).toFixed(1)} tok/s` : last?.speed ? `about ${last.speed.toFixed(1)} tok/s` : "";
}

function showWelcome() {
  $("welcome").hidden = current.messages.length > 0;
  $("hello").textContent = props?.model?.id ? `Ask ${props.model.id}` : "Ask a question";
  const kv = props?.kv, per = props?.context?.per_slot, slots = props?.context?.slots;
  $("plan").hidden = !(kv?.bytes > 0 && kv?.f16_bytes > 0);
  $("about").textContent = $("plan").hidden ? "" :
    `This server holds ${plural(slots, "conversation")} of ${count(per)} tokens in ${size(kv.bytes)} of KV memory` +
    (kv.bytes < 0.995 * kv.f16_bytes ? `. An f16 cache would need ${size(kv.f16_bytes)}.` : ", uncompressed.");
  if ($("plan").hidden) return;
  $("plan-kv").textContent = kv.choice ?? "This cache";
  $("plan-bytes").textContent = size(kv.bytes);
  $("plan-f16").textContent = size(kv.f16_bytes);
  $("plan-bar").style.width = `${Math.min(100, 100 * kv.bytes / kv.f16_bytes)}%`;
  $("plan-all").style.width = "100%";
}

const atEnd = () => $("scroller").scrollHeight - $("scroller").scrollTop - $("scroller").clientHeight < 48;
const scrollDown = () => { $("scroller").scrollTop = $("scroller").scrollHeight; };
const focusQuestion = () => { if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); };  // no keyboard jumps up on a phone

/** A button that copies text and says so. */
function copyButton(text) {
  const node = button("Copy", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // plain http on a network: only the old way works
      const area = document.body.appendChild(el("textarea", { value: text, className: "unseen" }));
      area.select();
      done = document.execCommand("copy");
      area.remove();
      node.focus();
    }
    node.textContent = done ? "Copied" : "Not copied";
    say(node.textContent);
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  });
  return node;
}

// ---- Conversations

function openChat(chat) {
  current = chat;
  editing = false;
  showList();
  showChat();
  scrollDown();
}

function remove(chat) {
  stop(chat);
  chats.delete(chat.id);
  memory.delete("tq.chat." + chat.id);
  try { localStorage.removeItem("tq.chat." + chat.id); } catch { /* was not kept */ }
  if (chat === current) openChat(newChat());
  toast(`Deleted “${chat.title.slice(0, 40)}”`, () => { chats.set(chat.id, chat); save(chat); openChat(chat); });
}

function download(some, name) {
  const text = JSON.stringify({ format: "turboquant conversations", version: 1, exported: new Date().toISOString(), conversations: some }, null, 2);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function importFile(file) {
  try {
    const some = JSON.parse(await file.text()).conversations;
    if (!Array.isArray(some) || !some.length || !some.every(validChat)) throw new Error();
    for (const chat of some) save({ updated: Date.now(), system: "", ...chat, id: newId() });
    showList();
    toast(`Imported ${plural(some.length, "conversation")}`);
  } catch {
    toast(`${file.name} holds no exported conversations`);
  }
}

// ---- Dialogs

/** Closes a dialog. Chromium then gives the focus back to a field, but after a click in the dialog not the caret: typing would go nowhere. */
function leave(dialog, value = "") {
  dialog.close(value);
  const field = document.activeElement;
  if (field.matches("input, textarea")) { field.blur(); field.focus(); }
}

function openSettings() {
  const form = $("options").querySelector("form");
  form.system.value = current.system ?? "";
  for (const name of NUMBERS) {
    form[name].value = settings[name] ?? "";
    form[name].placeholder = props?.sampling?.[name] ?? ({ seed: "random", max_tokens: "no limit" }[name] ?? "");
  }
  form.querySelector(".failure").hidden = true;
  $("options").showModal();
}

function saveSettings(form) {
  const wrong = NUMBERS.map((name) => form[name]).find((field) => !field.checkValidity());
  const told = form.querySelector(".failure");
  told.hidden = !wrong;
  if (wrong) {
    const whole = wrong.step === "1" ? "a whole number" : "a number";
    told.textContent = `${wrong.labels[0].textContent}: ${whole} from ${wrong.min} to ${wrong.max}, or nothing.`;
    return wrong.focus();
  }
  settings.system = current.system = form.system.value.trim();
  for (const name of NUMBERS) settings[name] = form[name].value === "" ? null : form[name].valueAsNumber;
  write("tq.settings", settings);
  if (chats.has(current.id)) save(current);
  leave($("options"));
}

/** Asks for the key; true when one was given. Several requests that wait for it share one dialog. */
function askKey(why) {
  askKey.asked ??= new Promise((resolve) => {
    const dialog = $("key"), form = dialog.querySelector("form");
    $("key-why").textContent = why;
    form.key.value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      askKey.asked = null;
      const given = dialog.returnValue === "given" && form.key.value.trim();
      if (given) keepKey(given);
      resolve(Boolean(given));
    };
    dialog.showModal();
  });
  return askKey.asked;
}

// ---- Keys, buttons, start

function drawer(open) {
  document.body.classList.toggle("drawer", open);
  $("menu").setAttribute("aria-expanded", open);
  document.querySelector("main").inert = open;
  if (open) $("new").focus();
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").setAttribute("aria-pressed", dark);
  return dark;
}

function fitQuestion() {
  $("question").style.height = "auto";
  $("question").style.height = $("question").scrollHeight + "px";
}

$("composer").onsubmit = (e) => {
  e.preventDefault();
  if (!ask($("question").value)) return;
  $("question").value = "";
  fitQuestion();
  focusQuestion();
};
$("question").oninput = fitQuestion;
$("question").onkeydown = (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); $("composer").requestSubmit(); }
  if (e.key === "ArrowUp" && $("question").value === "") { e.preventDefault(); edit(); }
};
document.onkeydown = (e) => {
  if (e.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("drawer")) { drawer(false); $("menu").focus(); } else stop();
};
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.oncancel = (e) => { e.preventDefault(); leave(dialog); };
  dialog.querySelector("[data-do=cancel]").onclick = () => leave(dialog);
}
$("stop").onclick = () => stop();
$("new").onclick = () => { openChat(newChat()); drawer(false); focusQuestion(); };
$("menu").onclick = () => drawer(true);
$("curtain").onclick = () => drawer(false);
$("down").onclick = () => { scrollDown(); focusQuestion(); };
$("scroller").onscroll = () => { $("down").hidden = atEnd(); };
$("export").onclick = () => download([...chats.values()], "conversations.json");
$("import").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files.length) importFile($("file").files[0]); $("file").value = ""; };
$("toast").lastElementChild.onclick = () => { $("toast").hidden = true; undo?.(); };
$("settings").onclick = openSettings;
$("options").querySelector("form").onsubmit = (e) => { e.preventDefault(); saveSettings(e.target); };
$("options").querySelector("[data-do=clear]").onclick = () => $("options").querySelectorAll("input, textarea").forEach((n) => { n.value = ""; });
$("key").querySelector("form").onsubmit = (e) => { e.preventDefault(); leave($("key"), "given"); };
$("theme").onclick = () => {
  const next = applyTheme(read("tq.theme")) ? "light" : "dark";
  const same = matchMedia("(prefers-color-scheme: dark)").matches === (next === "dark");
  write("tq.theme", same ? null : next);  // as the system has it: follow the system again
  applyTheme(same ? null : next);
};
matchMedia("(prefers-color-scheme: dark)").onchange = () => applyTheme(read("tq.theme"));
matchMedia("(max-width: 48rem)").onchange = () => drawer(false);
window.onstorage = (e) => {  // another tab
  const id = e.key?.startsWith("tq.chat.") ? e.key.slice(8) : null;
  if (!id || runs.has(id)) return;
  const chat = read(e.key);
  if (validChat(chat)) chats.set(id, chat); else chats.delete(id);
  if (current.id === id && validChat(chat)) { current = chat; if (!editing) showChat(); }
  showList();
};
window.onpagehide = () => {
  for (const chat of [...runs.keys()].map((id) => chats.get(id)).filter(Boolean))
    write("tq.chat." + chat.id, { ...chat, messages: chat.messages.filter((m) => m.content) });
};
new ResizeObserver(() => { $("down").hidden = atEnd(); }).observe($("messages"));

applyTheme(read("tq.theme"));
loadChats();
openChat(chats.get(location.hash.slice(1)) ?? [...chats.values()].sort((a, b) => b.updated - a.updated)[0] ?? newChat());
connect();
focusQuestion();
