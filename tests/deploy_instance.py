"""A fake instance in a process of its own: `python -m tests.deploy_instance PORT`.

It has what a router asks of an instance that gets no requests. `POST /running` with a number sets
how many requests its metrics tell of.
"""

from __future__ import annotations

import sys

from aiohttp import web

MODEL = {"data": [{"id": "tiny", "max_model_len": 64}]}
RUNNING = web.AppKey("RUNNING", list[str])


async def set_running(request: web.Request) -> web.Response:
    """Take the number that the metrics show from now on."""
    request.app[RUNNING][:] = [await request.text()]
    return web.Response()


async def show_metrics(request: web.Request) -> web.Response:
    """Show the one value that says whether the instance is idle."""
    (running,) = request.app[RUNNING]
    return web.Response(text=f'vllm:num_requests_running{{engine="0"}} {running}.0\n')


async def show_health(request: web.Request) -> web.Response:
    """Say that all is well."""
    return web.Response()


async def show_models(request: web.Request) -> web.Response:
    """Name the model."""
    return web.json_response(MODEL)


def main() -> None:
    """Serve until SIGTERM."""
    app = web.Application()
    app[RUNNING] = ["0"]
    app.add_routes(
        [
            web.get("/health", show_health),
            web.get("/v1/models", show_models),
            web.get("/metrics", show_metrics),
            web.post("/running", set_running),
        ]
    )
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
