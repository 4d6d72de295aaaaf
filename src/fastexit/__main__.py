"""``python -m fastexit``."""

import sys

from fastexit.cli import main

sys.exit(main())
