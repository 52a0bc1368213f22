"""Adam's moments of the factors, which some methods carry into new coordinates.

A gradient is multiplied by a matrix: by the method's M, or, where factors X become X M, by M^-T. So are first moments.
Second moments are multiplied by the squares of that matrix's entries: as if the gradient's r components in a row were
uncorrelated, since Adam keeps no more of them than a diagonal.
"""

from __future__ import annotations

from torch import Tensor

from ..engines.base import Engine

FIRST_MOMENT = "exp_avg"
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_NEEDED = {"exp_avg", "exp_avg_sq"}

Moments = dict[str, list[Tensor | None]]
"""By state key the local piece of every factor's moment, None where the optimizer has none."""


def moments_of(engine: Engine) -> Moments:
    """Return the moments of every factor, under the same keys on all ranks, also where a rank holds no element.

    Raises:
        RuntimeError: the optimizer keeps a state without Adam's moments.
    """
    states = engine.moments()
    amsgrad = any(group.get("amsgrad", False) for group in engine.optimizer.param_groups)
    for state in states:
        if state and not state.keys() >= _NEEDED:
            raise RuntimeError(f"the optimizer keeps {sorted(state)}, the method needs exp_avg and exp_avg_sq")
    keys = [FIRST_MOMENT, *_SECOND_MOMENTS[: 1 + amsgrad]]
    return {key: [state.get(key) for state in states] for key in keys}
