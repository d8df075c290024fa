"""The page at `/`, and the client in JavaScript that it stands on: files, served as they are."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.staticfiles import NotModifiedResponse, StaticFiles

# The types are told: what the machine's own table says of .js differs, and some browsers run no
# module that is called otherwise.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/relay.js": ("relay.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


_CACHING = StaticFiles()


def routes() -> list[Route]:
    return [Route(path, _serve) for path in FILES]


def _serve(request: Request) -> Response:
    """No coroutine, so that a thread waits for the disk, and not the loop."""
    name, media_type = FILES[request.url.path]
    path = Path(__file__).parent / name
    # A page out of a cache might not fit the server that it talks to.
    headers = {"cache-control": "no-cache"}
    file = FileResponse(path, headers=headers, media_type=media_type, stat_result=path.stat())
    if _CACHING.is_not_modified(file.headers, request.headers):
        return NotModifiedResponse(file.headers)
    return file
