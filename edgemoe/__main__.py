"""python -m edgemoe."""

import sys

from .cli import main

sys.exit(main())
