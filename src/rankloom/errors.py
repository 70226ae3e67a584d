"""Errors a user can act on: every message says what is wrong and what to do about it, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "AttentionError",
    "CompositionError",
    "DataError",
    "FingerprintError",
    "GradientError",
    "RankloomError",
    "RecipeError",
    "TargetError",
    "near_names",
]


class RankloomError(Exception):
    """Base of all errors the library raises on purpose; the command line prints it without a traceback, exit code 2."""


class RecipeError(RankloomError):
    """A recipe, method name or setting that does not exist or does not parse."""


class CompositionError(RecipeError):
    """Parts that exist but cannot work together, or not on this model."""


class TargetError(RankloomError):
    """A target pattern that matches nothing, an unsupported module, or an undeclared weight tie."""


class GradientError(RankloomError):
    """A trainable tensor without a gradient, or a loss or gradient that is not finite."""


class ArtifactError(RankloomError):
    """A missing, truncated, foreign or inconsistent file."""


class FingerprintError(ArtifactError):
    """An adapter that was made on another base model."""


class AttentionError(RankloomError):
    """Attention inputs or settings that no approximation can take."""


class DataError(RankloomError):
    """A dataset that is missing, empty, or lacks what the task needs."""


def near_names(name: str, known: Iterable[str], count: int = 4) -> str:
    """``"; did you mean a, b?"`` for the names in ``known`` closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; did you mean {', '.join(close)}?" if close else ""
