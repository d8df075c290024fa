"""The OpenAPI document as a page. What it loads comes from here as well: FastAPI's own would have
it from a CDN, and be blank where that is out of reach."""

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from api.caching import CacheControl

ASSETS = "/docs/assets"


def routes() -> list[BaseRoute]:
    # Of that package the files alone: the app that it makes is none of our class.
    assets = StaticFiles(packages=[("fastapi_offline", "static")])
    # They are large, and change with the version alone: a browser asks whether they have.
    return [Route("/docs", _swagger_ui), Mount(ASSETS, CacheControl(assets, "no-cache"))]


async def _swagger_ui(request: Request) -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url=request.app.openapi_url,
        title=request.app.title,
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
