"""The page at `/`: three files, served as they are."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}


def routes() -> list[Route]:
    return [Route(path, _serve) for path in FILES]


async def _serve(request: Request) -> FileResponse:
    # A page out of a cache might not fit the server that it talks to.
    headers = {"cache-control": "no-cache"}
    return FileResponse(Path(__file__).parent / FILES[request.url.path], headers=headers)
