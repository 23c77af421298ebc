"""``GET /flashtrace``: a page to chat with the served model and see where its answers came from.

Every file that can be fetched is listed here and read once, so a path from a client never reaches
the file system. The page holds no secret and no data of its own: both come from routes under
``/v1``, where ``--api-key`` is asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Request, Response

ROUTE = "/flashtrace"
_HTML, _CSS, _SCRIPT = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))
# Path below the route, package and name of the file, media type.
_FILES = [
    ("", "vllm_flashtrace.server", "static/index.html", _HTML),
    ("/heat.css", "vllm_flashtrace.api", "style.css", _CSS),
    ("/app.css", "vllm_flashtrace.server", "static/app.css", _CSS),
    *(
        (f"/{name}.js", "vllm_flashtrace.server", f"static/{name}.js", _SCRIPT)
        for name in (
            "api",
            "app",
            "citations",
            "documents",
            "dom",
            "download",
            "heat",
            "keys",
            "report",
            "requests",
            "selecting",
            "turn",
        )
    ),
]
# No inline script or style, no other host, no parsing of text as HTML, no frame around the page.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Routes of the page and its files; they are not part of the API schema."""
    router = APIRouter(include_in_schema=False)
    for path, package, name, media_type in _FILES:
        content = files(package).joinpath(name).read_bytes()
        router.add_api_route(
            f"{ROUTE}{path}", _sender(content, media_type), methods=["GET", "HEAD"]
        )
    return router


def _sender(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        answer = Response(content, media_type=media_type, headers=HEADERS)
        if request.method == "HEAD":
            answer.body = b""  # The headers stay, the length among them.
        return answer

    return send
