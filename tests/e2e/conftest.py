"""The tiny model and data on disk."""

from tests.tiny import tiny_llama, tiny_reviews  # noqa: F401
