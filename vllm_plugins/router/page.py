"""The status page: it loads nothing, and writes values as text alone.

Its script asks for ``status.json`` once a second and changes what has changed, in place, so that
nothing moves under the reader's eyes and a screen reader is told of changes of state alone.
"""

from __future__ import annotations

import base64
import hashlib

from vllm_plugins.router.admin import KEY_HEADER
from vllm_plugins.router.page_script import SCRIPT
from vllm_plugins.router.page_style import STYLE

# Without an icon of its own a browser asks for /favicon.ico.
ICON = '<link rel="icon" href="data:,">'
_SCRIPT = SCRIPT.replace("KEY_HEADER", KEY_HEADER)

PAGE = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Router</title>
{ICON}
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Router <bdi id="model"></bdi></h1>
<p id="live" class="waiting"><span id="said" role="status">Waiting for values</span>
<span id="seen"></span></p>
</header>
<noscript><p>The values need JavaScript here; they are those of status.json.</p></noscript>
<form id="lock" hidden>
<label for="entered">Operator's key</label>
<input id="entered" type="password" autocomplete="off" required>
<button>Show values</button>
<p id="refused" role="alert"></p>
</form>
<main id="values" hidden>
<h2>Queues and held KV</h2>
<ul id="queues"></ul>
<h2>Instances</h2>
<p id="change"></p>
<table role="table">
<thead role="rowgroup"><tr role="row" id="heads"></tr></thead>
<tbody role="rowgroup" id="instances"></tbody>
</table>
<p class="note">Requests and backlog are this router's own and what it sees of others'. Running,
waiting and KV are what an instance says of itself; one that is down says nothing.</p>
<h2>Changes since this page was opened</h2>
<ol id="news" role="log" aria-label="Changes"><li id="quiet">None yet</li></ol>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _only(kind: str, text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"{kind} 'sha256-{digest}'"


# Nothing from elsewhere is loaded, and nothing that an instance says can become part of the page:
# this script and this style alone are carried out.
POLICY = "; ".join(
    (
        "default-src 'none'",
        _only("script-src", _SCRIPT),
        _only("style-src", STYLE),
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
