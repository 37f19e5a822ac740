"""The text of the status page. It loads nothing, and writes values as text alone."""

from __future__ import annotations

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>vllm-plugins route</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; margin: 1em 0; }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ccc; }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; }
.up { color: #060; } .down { color: #b00; font-weight: bold; } .draining { color: #850; }
#trouble { color: #b00; }
</style>
</head>
<body>
<h1>Router <small id="model"></small></h1>
<p id="trouble"></p>
<p id="key" hidden>Operator's key: <input type="password" id="entered" autocomplete="off"></p>
<p>Waiting: <span id="queues">-</span>. <span id="change"></span></p>
<table>
<thead><tr><th>Instance</th><th>Address</th><th>Role</th><th>State</th><th>Requests</th>
<th title="prompt tokens (prefill), KV blocks (decode), encoder tokens (encode)">Backlog</th>
<th>Running</th><th>Waiting</th><th>KV used</th><th>KV blocks held</th></tr></thead>
<tbody id="instances"></tbody>
</table>
<p><small>Requests and backlog are this router's own and what it sees of others'; running, waiting
and KV are what the instance says of itself.</small></p>
<script>
"use strict";
const part = name => document.getElementById(name);
const shown = value => value === null || value === undefined ? "-" : String(value);
function cell(row, value, name) {
  const made = row.insertCell();
  made.textContent = shown(value);
  if (name) made.className = name;
}
function show(all) {
  part("model").textContent = shown(all.model);
  part("queues").textContent =
    Object.entries(all.queues).map(([role, count]) => role + " " + count).join(", ");
  part("change").textContent = all.change_of_role ? "Changing role: " + all.change_of_role : "";
  const body = document.createElement("tbody");
  body.id = "instances";
  for (const one of all.instances) {
    const row = body.insertRow();
    cell(row, one.id);
    cell(row, one.url);
    cell(row, one.role);
    cell(row, one.state, ["up", "down", "draining"].includes(one.state) ? one.state : "");
    cell(row, one.requests);
    cell(row, one.kv_blocks && one.role === "decode"
      ? one.backlog + " / " + one.kv_blocks : one.backlog);
    cell(row, one.running);
    cell(row, one.waiting);
    cell(row, one.kv_usage === null ? null : (100 * one.kv_usage).toFixed(1) + " %");
    cell(row, one.held_blocks);
  }
  part("instances").replaceWith(body);
}
async function look() {
  try {
    const answer = await fetch("status.json", {headers: {"KEY_HEADER": part("entered").value}});
    part("key").hidden = answer.status !== 403 && !part("entered").value;
    part("trouble").textContent = answer.ok ? "" : "The router answers " + answer.status + ".";
    if (answer.ok) show(await answer.json());
  } catch (error) {
    part("trouble").textContent = "The router does not answer.";
  }
  setTimeout(look, 1000);
}
look();
</script>
</body>
</html>
"""
