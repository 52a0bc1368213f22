"""``python -m reflora_dist.doctor CONFIG...``: what a run would do, before it starts.

``options`` is the command line, and ``files`` reads configurations. ``setups`` makes a ``Setup`` of them: it has the
libraries that they are for try the run in small. ``rehearsal`` starts the process for that, ``small_run`` is its
program, ``stand_in`` replaces what needs GPUs and other ranks there, ``arguments`` are the trainer's options, and
``refusals`` is what libraries say. ``deepspeed_config``, ``deepspeed_optimizer``, ``deepspeed_zero``,
``accelerate_config`` and ``fsdp_config`` know what libraries accept although the method cannot use it.
``base_model`` builds the model on the meta device; ``held`` says what a rank holds, ``activations`` what a backward
pass needs, ``wire`` what is sent; ``versions`` and ``ranks`` look at this machine and the other ranks; ``diagnosis``
puts it together and ``tables`` prints it.
"""

from __future__ import annotations

from .diagnosis import diagnose
from .options import DoctorOptions

__all__ = ["DoctorOptions", "diagnose"]
