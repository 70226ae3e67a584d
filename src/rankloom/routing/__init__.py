"""Which adapters act on which token, task or request."""

from rankloom.routing.single import Single

__all__ = ["Single"]
