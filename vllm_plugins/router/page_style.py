"""How the status page looks: light or dark as the reader's system is, wide or as cards."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --back: #f6f7f9; --card: #fff; --text: #1a1d23; --soft: #59616e; --line: #d9dde3;
  --good: #136b34; --warn: #8a4b00; --bad: #b3191f; --bar: #2f6fd0; --trough: #e6e9ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171c; --card: #1d2128; --text: #e6e9ee; --soft: #a0a8b5; --line: #363c47;
    --good: #5fd28a; --warn: #f2b457; --bad: #ff8b85; --bar: #6ea2f5; --trough: #313743;
  }
}
* { box-sizing: border-box; }
html { scrollbar-gutter: stable; }
body {
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  background: var(--back); color: var(--text);
  margin: 0 auto; max-width: 82rem; padding: 1.25rem 1.5rem 3rem;
}
header {
  display: flex; flex-wrap: wrap; gap: .25rem 1.5rem;
  align-items: baseline; justify-content: space-between;
}
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h1 bdi { font-weight: normal; color: var(--soft); margin-left: .4rem; }
h2 { font-size: 1rem; margin: 1.75rem 0 .6rem; }
[hidden] { display: none; }
#live { margin: 0; }
#said { font-weight: 600; }
#seen { color: var(--soft); }
#live.live #said { color: var(--good); }
#live.stale #said { color: var(--bad); }
main.stale { opacity: .6; }

form {
  display: flex; flex-wrap: wrap; gap: .6rem; align-items: center;
  margin-top: 1.5rem; padding: 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
}
form p { flex-basis: 100%; margin: 0; min-height: 1.45em; color: var(--bad); }
input, button { font: inherit; padding: .35rem .7rem; min-width: 0; }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }

#queues {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem;
  list-style: none; margin: 0; padding: 0;
}
#queues li {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem 1rem;
}
#queues h3 { font-size: .95rem; margin: 0; }
#queues p { margin: 0; color: var(--soft); }
#queues p.count { color: var(--text); }
#queues p.count b { font-size: 1.9rem; line-height: 1.25; }

#change { margin: 0 0 .6rem; min-height: 1.45em; color: var(--soft); }
#change.going { color: var(--warn); font-weight: 600; }
table {
  border-collapse: collapse; table-layout: fixed; width: 100%;
  background: var(--card); border: 1px solid var(--line);
}
th, td { padding: .5rem .7rem; text-align: right; vertical-align: top; }
thead th { font-size: .85rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr + tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text { text-align: left; }
thead th.instance { width: 21%; }
thead th.backlog { width: 15%; }
small { display: block; font-size: .85rem; font-weight: normal; color: var(--soft); }
.state b::before { margin-right: .4em; }
.up b { color: var(--good); } .up b::before { content: "\\25cf" / ""; }
.draining b { color: var(--warn); } .draining b::before { content: "\\25d0" / ""; }
.down b { color: var(--bad); } .down b::before { content: "\\2715" / ""; }
.trough { display: block; height: .35rem; background: var(--trough); margin-top: .3rem; }
.trough i { display: block; height: 100%; width: 0; background: var(--bar); }
.note { color: var(--soft); font-size: .9rem; max-width: 60rem; }
#news { list-style: none; margin: 0; padding: 0; min-height: 12rem; }
#news time { color: var(--soft); margin-right: .8rem; }
#quiet { color: var(--soft); }

@media (max-width: 56rem) {
  body { padding: 1rem 1rem 2rem; }
  #queues { grid-template-columns: 1fr 1fr; }
  table { display: block; background: none; border: 0; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .8rem; }
  tbody tr, tbody tr + tr {
    display: grid; grid-template-columns: 5fr 4fr 4fr; padding: .5rem .3rem;
    background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  }
  tbody th { grid-column: 1 / -1; }
  th, td, .text { padding: .3rem .5rem; text-align: left; }
  tbody td::before {
    content: attr(data-head); display: block; font-size: .85rem; color: var(--soft);
  }
}
@media (max-width: 34rem) {
  header h1 { flex-basis: 100%; }
  #seen { display: block; }
  #queues { grid-template-columns: 1fr; }
  #queues li { display: grid; grid-template-columns: 3fr 2fr; column-gap: 1rem; }
  #queues p.count { grid-row: 1 / span 3; grid-column: 2; text-align: right; }
  #queues p.count span { display: block; color: var(--soft); }
}
"""
