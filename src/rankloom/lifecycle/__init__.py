"""What happens between the phases of a run."""

from rankloom.lifecycle.base import LifecyclePart
from rankloom.lifecycle.once import Once

__all__ = ["LifecyclePart", "Once"]
