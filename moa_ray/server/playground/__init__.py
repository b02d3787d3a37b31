"""The page at `/`: asks a graph, and shows how its answer comes about. Static files; needs nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

_TYPES = {"css": "text/css", "js": "text/javascript"}
_FILES = {
    entry.name: entry.read_bytes()
    for entry in resources.files(__name__).iterdir()
    if entry.name.rpartition(".")[2] in (*_TYPES, "html")
}
_GUARDS = {
    # Nothing is loaded from elsewhere, nothing runs that is not in our files, and nobody frames the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def page(request: Request) -> Response:
    """The page itself; its files are named relative to it."""
    path = request.url.path
    if not path.endswith("/"):
        return RedirectResponse(f"{path}/")
    return Response(_FILES["index.html"], media_type="text/html", headers=_GUARDS)


async def file(name: str) -> Response:
    """One of its files."""
    kind = _TYPES.get(name.rpartition(".")[2])
    if kind is None or name not in _FILES:
        raise HTTPException(404)
    return Response(_FILES[name], media_type=kind, headers={**_GUARDS, "Cache-Control": "max-age=60"})
