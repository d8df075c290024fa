"""The OpenAPI document, and as a page. What that loads comes from here as well: FastAPI's own would
have it from a CDN, and be blank where that is out of reach."""

from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from api.caching import CacheControl

ASSETS = "/docs/assets"


def described(document: dict[str, Any], model: str) -> dict[str, Any]:
    """FastAPI's OpenAPI document, changed in place; harmless to repeat. Its examples ask for this
    model: with another they would be refused.

    FastAPI puts a 422 of its own shape to every route with a parameter; here no route has that
    shape, and most have nothing that could be invalid.
    """
    schemas = document["components"]["schemas"]
    for methods in [*document["paths"].values(), *document["webhooks"].values()]:
        for operation in methods.values():
            content = operation["responses"].get("422", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            if schema.get("$ref", "").endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "deployment":
                    parameter["example"] = model
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in schemas.values():
        if "model" in schema.get("required", ()):
            for example in schema["examples"]:
                example["model"] = model
    return document


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
