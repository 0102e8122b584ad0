// Asks the server what runs and shows it. Every text goes in as text: names are what clients made of them.
"use strict";

const INTERVAL_MS = 1000;
const USAGE_EVERY = 15;
const before = new Map();
let turn = 0;

function element(tag, content = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = content;
  if (className) made.className = className;
  return made;
}

function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let power = 0;
  while (bytes >= 1000 && power < units.length - 1) { bytes /= 1000; power += 1; }
  return `${bytes.toFixed(power && bytes < 10 ? 1 : 0)} ${units[power]}`;
}

function time(seconds) {
  if (seconds === null) return "for ever";
  if (seconds < 0) return "now";
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function share(part, whole) { return whole ? `${(100 * part / whole).toFixed(0)} %` : "-"; }

// Tokens of the last moments, from what the counter was when we looked before.
function pace(runner, now) {
  const last = before.get(runner.pid);
  before.set(runner.pid, { tokens: runner.tokens, now });
  const tokens = last ? runner.tokens - last.tokens : 0;
  return tokens > 0 ? tokens / (now - last.now) * 1000 : 0;
}

function facts(runner, now) {
  const cells = runner.kv_cells;
  const { prefill, reused, saved, restored } = runner.prefixes;
  return [
    ["memory", size(runner.size)],
    ["on accelerators", size(runner.size_vram)],
    ["context", runner.context_length],
    ["stays", runner.in_flight && !runner.pinned ? `idle for ${time(runner.keep_alive_s)}` : time(runner.expires_in_s)],
    ["in flight", runner.in_flight],
    ["queued", runner.queued],
    ["served", runner.served],
    ["sequences", `${runner.sequences.running} + ${runner.sequences.waiting} waiting`],
    ["KV cells", cells.total ? `${cells.used} of ${cells.total} (${share(cells.used, cells.total)})` : "none kept"],
    ["prompt tokens shared", share(reused, reused + prefill)],
    ["prefix shelf", `${saved} saved, ${restored} restored`],
    ["tokens/s", `${pace(runner, now).toFixed(1)} now, ${runner.tokens_per_s.toFixed(1)} mean`],
    ["process", `${runner.pid}, ${runner.threads} threads`],
    ["options", Object.entries(runner.options).map(([name, value]) => `${name} ${value}`).join(", ") || "none"],
  ];
}

function card(runner, now) {
  const article = element("article");
  const title = element("h3", runner.name);
  const words = [runner.state, runner.mode, runner.digest.slice(0, 12), runner.details.quantization_level];
  if (runner.pinned) words.push("pinned");
  if (runner.draining) words.push("takes no new requests");
  title.append(element("span", words.filter(Boolean).join(" \u00b7 ")));
  article.append(title);
  if (runner.state === "starting") {
    const bar = element("progress");
    bar.max = 1;
    bar.value = runner.load_progress;
    article.append(bar, ` ${(100 * runner.load_progress).toFixed(0)} % loaded`);
    return article;
  }
  const list = element("dl");
  for (const [name, value] of facts(runner, now)) {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    list.append(row);
  }
  article.append(list);
  return article;
}

function fill(id, rows, nothing, width) {
  const empty = element("td", nothing, "quiet");
  empty.colSpan = width;
  const lines = rows.length ? rows : [[empty]];
  document.getElementById(id).replaceChildren(...lines.map((cells) => {
    const line = element("tr");
    line.append(...cells);
    return line;
  }));
}

const number = (value) => element("td", value, "n");

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.json();
}

async function showRunners() {
  const { runners, waiting } = await ask("/admin/runners");
  const now = performance.now();
  const cards = runners.map((runner) => card(runner, now));
  document.getElementById("runners").replaceChildren(...(cards.length ? cards : [element("p", "none loaded", "quiet")]));
  const rows = waiting.map((one) => [
    element("td", one.name), element("td", one.mode), number(one.context_length), number(time(one.waited_s)),
  ]);
  fill("waiting", rows, "nobody", 4);
}

async function showUsage() {
  const { rows } = await ask("/admin/usage?by=caller,model&since=24h");
  fill("usage", rows.map((row) => [
    element("td", row.caller), element("td", row.model || "-"), number(row.num_requests), number(row.num_errors),
    number(row.prompt_tokens), number(row.completion_tokens), number(row.tokens_per_second?.toFixed(1) ?? "-"),
  ]), "no requests", 7);
}

async function look() {
  const state = document.getElementById("state");
  try {
    await showRunners();
    if (turn++ % USAGE_EVERY === 0) await showUsage();
    state.textContent = `as of ${new Date().toLocaleTimeString()}`;
    state.className = "";
  } catch (error) {
    state.textContent = `no answer: ${error.message}`;
    state.className = "lost";
  }
  setTimeout(look, INTERVAL_MS);
}

look();
