"""What collectives deliver to this rank, counted below all that calls them: torch's own operators are watched."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING = ("send", "barrier", "monitored_barrier_")


class Delivery(NamedTuple):
    """One collective: the operator's name, and what this rank has from it, its own part included."""

    kind: str
    numel: int
    bytes: int


class Deliveries(TorchDispatchMode):
    """Lists the collectives meanwhile, whoever calls them.

    Attributes:
        calls: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Delivery] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func._schema.name.partition("::")[2]
        if func.namespace == "c10d" and kind not in _NOTHING:
            self._count(kind, args[0])  # the first argument is what is written
        return result

    def _count(self, kind: str, delivered: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(delivered) if isinstance(leaf, Tensor)]
        numel = sum(tensor.numel() for tensor in tensors)
        self.calls.append(Delivery(kind, numel, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(call.bytes for call in self.calls)
