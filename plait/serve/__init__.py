"""A model over HTTP, as OpenAI's clients ask: requests are written together on one pool."""

from plait.serve.app import Service
from plait.serve.batching import Batch, Request

__all__ = ["Batch", "Request", "Service"]
