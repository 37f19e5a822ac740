"""What the status page does: ask once a second, and change what has changed."""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const EVERY_MS = 1000, PATIENCE_MS = 4000, OLD_S = 5, MOST_NEWS = 8, NOTHING = "\u2013";
const HEADS = {instance: "Instance", role: "Role", state: "State", requests: "Requests",
  backlog: "Backlog", running: "Running", waiting: "Waiting", kv: "KV in use",
  held: "KV held"};
const TEXTS = ["instance", "role", "state"];
const UNITS = {prefill: "prompt tokens", decode: "KV blocks", encode: "encoder tokens"};
const part = name => document.getElementById(name);
const rows = new Map(), tiles = new Map(), known = new Map();
let key = "", failing = null;

function put(node, text) {
  // Writing what stands there already would undo a selection and be read aloud again.
  if (node.textContent !== text) node.textContent = text;
}
function number(value, digits = 0) {
  if (value === null || value === undefined) return NOTHING;
  return value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
}
function seconds(value) {
  return number(value, value < 100 ? 1 : 0) + " s";
}
function grow(parent, kind, name) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  return parent.appendChild(made);
}
function clock() {
  return new Date().toTimeString().slice(0, 8);
}

function tile(name) {
  if (tiles.has(name)) return tiles.get(name);
  const made = grow(part("queues"), "li");
  const parts = {title: grow(made, "h3"), count: grow(made, "p", "count"),
    more: grow(made, "p"), last: grow(made, "p")};
  parts.number = grow(parts.count, "b");
  parts.unit = grow(parts.count, "span");
  tiles.set(name, parts);
  return parts;
}
function fill(name, title, count, unit, more, last) {
  const parts = tile(name);
  put(parts.title, title);
  put(parts.number, number(count));
  put(parts.unit, " " + unit);
  put(parts.more, more);
  put(parts.last, last);
}
function showQueues(all) {
  for (const [role, count] of Object.entries(all.queues)) {
    const mine = all.instances.filter(one => one.role === role);
    const up = mine.filter(one => one.state === "up").length;
    const longest = all.longest_wait_s[role];
    fill("queue " + role, "Waiting for " + role, count, "of at most " + number(all.max_queue),
      longest === null ? "nobody waits" : "longest wait " + seconds(longest),
      up + " of " + mine.length + (mine.length === 1 ? " instance" : " instances") + " up");
  }
  if (!("decode" in all.queues)) return;
  const held = all.held, left = held.lease_left_s;
  fill("held", "KV held for decode", held.prompts, held.prompts === 1 ? "prompt" : "prompts",
    number(held.tokens) + " tokens",
    left === null ? "no lease runs"
      : left > 0 ? "first lease ends in " + seconds(left) : "a lease may have ended");
}

function row(id) {
  if (rows.has(id)) return rows.get(id);
  const made = grow(part("instances"), "tr"), cells = {};
  made.setAttribute("role", "row");
  for (const [name, head] of Object.entries(HEADS)) {
    const cell = grow(made, name === "instance" ? "th" : "td",
      TEXTS.includes(name) ? name + " text" : name);
    cell.setAttribute("role", name === "instance" ? "rowheader" : "cell");
    cell.dataset.head = head;
    cells[name] = {cell, main: grow(cell, name === "state" ? "b" : "span"),
      small: grow(cell, "small")};
  }
  const trough = grow(cells.kv.cell, "span", "trough");
  trough.setAttribute("aria-hidden", "true");
  const found = {made, cells, bar: grow(trough, "i")};
  rows.set(id, found);
  return found;
}
function set(cells, name, main, small = "") {
  put(cells[name].main, main);
  put(cells[name].small, small);
}
function showInstance(one) {
  const {cells, bar} = row(one.id);
  const old = one.metrics_age_s !== null && one.metrics_age_s > OLD_S;
  set(cells, "instance", one.id, one.url);
  set(cells, "role", one.role);
  set(cells, "state", one.state, old ? "values " + seconds(one.metrics_age_s) + " old" : "");
  cells.state.cell.className = "state text " + one.state;
  set(cells, "requests", number(one.requests));
  const limit = one.role === "decode" && one.kv_blocks ? "of " + number(one.kv_blocks) + " " : "";
  set(cells, "backlog", number(one.backlog), limit + UNITS[one.role]);
  set(cells, "running", number(one.running));
  set(cells, "waiting", number(one.waiting));
  const share = one.kv_usage;
  set(cells, "kv", share === null ? NOTHING : number(100 * share, 1) + " %");
  bar.style.width = 100 * Math.min(1, share || 0) + "%";
  set(cells, "held", number(one.held_blocks), one.held_blocks === null ? "" : "blocks");
}
function showInstances(all) {
  for (const one of all) showInstance(one);
  const present = new Set(all.map(one => one.id));
  for (const [id, {made}] of rows) {
    if (!present.has(id)) {
      made.remove();
      rows.delete(id);
    }
  }
}

function tell(text) {
  part("quiet").hidden = true;
  const line = grow(part("news"), "li");
  grow(line, "time").textContent = clock();
  grow(line, "span").textContent = text;
  part("news").prepend(line);
  while (part("news").children.length > MOST_NEWS + 1) part("news").children[MOST_NEWS].remove();
}
function tellChanges(all) {
  const first = !known.size, gone = new Set(known.keys());
  for (const one of all) {
    const before = known.get(one.id);
    gone.delete(one.id);
    known.set(one.id, {state: one.state, role: one.role});
    if (first) continue;
    if (!before) tell(one.id + " was added: " + one.role + ", " + one.state);
    else if (before.role !== one.role)
      tell(one.id + " went from " + before.role + " to " + one.role);
    else if (before.state !== one.state) tell(one.id + " is " + one.state);
  }
  for (const id of gone) {
    known.delete(id);
    tell(id + " was removed");
  }
}

function show(all) {
  put(part("model"), all.model || "");
  showQueues(all);
  put(part("change"), all.change_of_role ? "Changing role: " + all.change_of_role
    : "No instance is changing its role.");
  part("change").className = all.change_of_role ? "going" : "";
  showInstances(all.instances);
  tellChanges(all.instances);
}
function say(kind, text) {
  part("live").className = kind;
  part("values").className = kind;
  put(part("said"), text);
  document.title = (kind === "live" ? "" : text + " \u2013 ") + "Router";
}
function locked() {
  failing = null;
  part("lock").hidden = false;
  part("values").hidden = true;
  put(part("refused"), key ? "The router refuses this key." : "");
  put(part("seen"), "");
  say("waiting", "Locked");
}
function fails(text) {
  failing = failing || clock();
  say("stale", "Stale: " + text + " since " + failing);
}
async function ask() {
  const headers = key ? {"KEY_HEADER": key} : {};
  const answer = await fetch("status.json", {headers, signal: AbortSignal.timeout(PATIENCE_MS)});
  if (answer.status === 403) return locked();
  if (!answer.ok) return fails("the router has answered " + answer.status);
  const all = await answer.json();
  if (failing) tell("the router answers again");
  failing = null;
  part("lock").hidden = true;
  part("values").hidden = false;
  show(all);
  put(part("seen"), "values as of " + clock());
  say("live", "Live");
}
async function look() {
  try {
    // Without the key every question is refused, and the console would fill up.
    if (part("lock").hidden) await ask();
  } catch {
    fails("no answer");
  }
  setTimeout(look, EVERY_MS);
}

for (const [name, head] of Object.entries(HEADS)) {
  const cell = grow(part("heads"), "th", TEXTS.includes(name) ? name + " text" : name);
  cell.scope = "col";
  cell.setAttribute("role", "columnheader");
  cell.textContent = head;
}
part("lock").addEventListener("submit", event => {
  event.preventDefault();
  const entered = part("entered").value.trim();
  if (/^[ -~]*$/.test(entered)) {
    key = entered;
    ask().catch(() => fails("no answer"));
  } else put(part("refused"), "A key has letters, digits and signs of ASCII alone.");
});
look();
"""
