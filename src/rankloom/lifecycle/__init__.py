"""What happens between the phases of a run."""

from rankloom.lifecycle.once import Once

__all__ = ["Once"]
