"""rankloom: every published low-rank method as a composition of a few orthogonal parts.

>>> import rankloom
>>> print(rankloom.methods.get("rslora").expand().splitlines()[1][:30])
adapter    lora(scaling='rslor
"""

from rankloom import methods
from rankloom.adapt import Adaptation, adapt, load
from rankloom.calibration import Calibration
from rankloom.errors import RankloomError
from rankloom.recipe import Recipe
from rankloom.targets import Targets

__version__ = "0.1.0"

__all__ = ["Adaptation", "Calibration", "RankloomError", "Recipe", "Targets", "__version__", "adapt", "load", "methods"]
