"""``python -m reflora_dist.doctor CONFIG...``: predicts what a run would do, before it starts.

Input: ``options`` defines the command line, and ``files`` reads configuration files.

Setup: ``setups`` turns the files into a ``Setup``. It lets the libraries rehearse the run: one step of a tiny model, on
the CPU, as rank 0 of a group without other ranks. ``rehearsal`` starts the process for that, ``small_run`` is its
program, ``stand_in`` replaces GPUs and other ranks there, ``arguments`` derives the trainer's options, and ``refusals``
reads the libraries' errors. ``deepspeed_config``, ``deepspeed_optimizer``, ``deepspeed_zero``, ``accelerate_config``
and ``fsdp_config`` find settings that the libraries accept and the method cannot use.

Estimates: ``base_model`` builds the model on the meta device, and ``four_bit`` packs its base. ``held`` estimates the
memory of a rank, ``activations`` that of forward and backward, and ``wire`` the bytes sent.

Output: ``versions`` and ``ranks`` check this machine and the other ranks, ``diagnosis`` combines everything, and
``tables`` prints it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import DoctorOptions

if TYPE_CHECKING:
    from .diagnosis import diagnose

__all__ = ["DoctorOptions", "diagnose"]


def __getattr__(name: str) -> Any:
    """Import ``diagnose`` at its first use: ``--help`` is printed without torch, whose import takes seconds."""
    if name == "diagnose":
        from .diagnosis import diagnose

        return diagnose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
