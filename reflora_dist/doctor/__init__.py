"""``python -m reflora_dist.doctor CONFIG...``: what a run would do, before it starts.

``options`` is the command line; ``files`` reads configurations, and ``deepspeed_config`` and ``accelerate_config`` make
a ``Setup`` of them with the libraries that they are for; ``fsdp_config`` judges FSDP, ``deepspeed_optimizer`` the
optimizer that DeepSpeed's names, ``values`` the types in all of them; ``base_model`` builds the model on the meta
device; ``held`` says what a rank holds, ``activations`` what a backward pass needs, ``wire`` what is sent; ``versions``
and ``ranks`` look at this machine and the other ranks; ``diagnosis`` puts it together and ``tables`` prints it.
"""

from __future__ import annotations

from .diagnosis import diagnose
from .options import DoctorOptions

__all__ = ["DoctorOptions", "diagnose"]
