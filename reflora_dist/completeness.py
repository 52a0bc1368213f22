"""The name under which release 0.1 documented ``reflora_dist.checkpoints.complete``."""

import sys

from .checkpoints import complete

sys.modules[__name__] = complete
