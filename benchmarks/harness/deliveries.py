"""Count what collectives deliver to this rank, at the level of torch's own operators."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING = ("send", "barrier", "monitored_barrier_")


class Delivery(NamedTuple):
    """One collective: the operator's name, and the elements and bytes it gives this rank, its own part included."""

    kind: str
    numel: int
    bytes: int


class Deliveries(TorchDispatchMode):
    """List all collectives while the mode is active, by any caller.

    Attributes:
        calls: the collectives so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Delivery] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func._schema.name.partition("::")[2]
        if func.namespace == "c10d" and kind not in _NOTHING:
            self._count(kind, args[0])  # the first argument is the output
        return result

    def _count(self, kind: str, delivered: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(delivered) if isinstance(leaf, Tensor)]
        numel = sum(tensor.numel() for tensor in tensors)
        self.calls.append(Delivery(kind, numel, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))

    @property
    def bytes(self) -> int:
        """The bytes of all calls."""
        return sum(call.bytes for call in self.calls)
