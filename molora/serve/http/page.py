"""The page at `/`: adapters, live routing and shares, from files of this package; it loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parent / "static"
KINDS = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
# nothing from elsewhere may run in it, and no other page may frame it
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/")
def index() -> FileResponse:
    """Return the page."""
    return _file("index.html")


@router.get("/page.js")
def script() -> FileResponse:
    """Return its script."""
    return _file("page.js")


@router.get("/page.css")
def style() -> FileResponse:
    """Return its style."""
    return _file("page.css")


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, media_type=KINDS[name], headers=POLICY)
