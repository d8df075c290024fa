"""The page at `/`, and the client in JavaScript that it stands on: files, served as they are."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

# The types are told: what the machine's own table says of .js differs, and some browsers run no
# module that is called otherwise.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/relay.js": ("relay.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def routes() -> list[Route]:
    return [Route(path, _serve) for path in FILES]


async def _serve(request: Request) -> FileResponse:
    name, media_type = FILES[request.url.path]
    # A page out of a cache might not fit the server that it talks to.
    headers = {"cache-control": "no-cache"}
    return FileResponse(Path(__file__).parent / name, headers=headers, media_type=media_type)
