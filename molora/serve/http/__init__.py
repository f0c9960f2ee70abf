"""The HTTP side of a server: OpenAI's endpoints, the adapters' and the tenants', metrics, health, and a page."""

from .app import create_app

__all__ = ["create_app"]
