"""The tiny models of the worker's tests."""

from tests.worker.conftest import llama, tiny

__all__ = ["llama", "tiny"]
