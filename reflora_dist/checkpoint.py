"""The name under which release 0.1 documented ``reflora_dist.checkpoints.training_state``."""

import sys

from .checkpoints import training_state

sys.modules[__name__] = training_state
