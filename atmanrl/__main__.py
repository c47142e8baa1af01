"""``python -m atmanrl`` and ``accelerate launch -m atmanrl``."""

import sys

from atmanrl.cli import main

sys.exit(main())
