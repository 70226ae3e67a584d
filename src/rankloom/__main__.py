"""``python -m rankloom``."""

import sys

from rankloom.cli import main

sys.exit(main())
