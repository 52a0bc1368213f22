"""Make machines meet at the head's address before a launch, and compare what must be the same on all of them.

    python launchers/cluster/meeting.py --nodes 2 --node_rank 1 --head 10.0.0.1 --port 29500 processes=8

Launchers notice a wrong address, a missing machine or another number of processes only after minutes, or never. The
script prints the network interface towards the head and this machine's address on it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import ipaddress
import json
import platform
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    runpy.run_module("launchers.cluster.meeting", run_name="__main__", alter_sys=True)
    raise SystemExit

from ..options import meeting_parser

if __name__ == "__main__":
    meeting_parser().parse_args()  # --help and mistakes are answered before torch is imported, which takes seconds

import psutil
from torch.distributed import DistNetworkError, TCPStore

from .waiting import told

_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "peft")
_POLL_SECONDS = 0.2
_FAREWELL_SECONDS = 10.0  # how long the others may take to read the head's error

Facts = dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exit with a message if the machines cannot start."""
    options = meeting_parser().parse_args(argv)
    try:
        print(*meet(**vars(options)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def meet(nodes: int, node_rank: int, head: str, port: int, wait: float, facts: Sequence[str]) -> tuple[str, str]:
    """Wait for all machines, and compare ``facts`` and the versions of the libraries.

    Returns:
        The interface that routes to the head, and this machine's address on it.

    Raises:
        ValueError: an argument is wrong; the head is another machine, unreachable, or its ports are taken; a machine
            is missing or came twice; two machines differ. The message names the cause.
    """
    if not 0 <= node_rank < nodes:
        raise ValueError(f"--node-rank {node_rank} is out of range: {nodes} machines have ranks 0 to {nodes - 1}")
    interface, address = route_to(head, port, is_head=node_rank == 0)
    own = {"nodes": str(nodes), **dict(fact.split("=", 1) for fact in facts), **_versions()}
    store = _open(head, port, wait) if node_rank == 0 else _join(head, port + 1, wait)
    try:
        addresses = _compare_on(store, {**own, "address": address}, nodes, node_rank, wait)
    except DistNetworkError:
        raise ValueError(f"the head at {head} has gone; what it printed says why") from None
    if node_rank == 0 and own.get("launcher") == "torchrun" and min(addresses) != addresses[0]:
        first = addresses.index(min(addresses))
        print(
            "note: torchrun numbers machines by their addresses as text, so rank 0, which writes results, runs on "
            f"{addresses[first]} (--node-rank {first})",
            file=sys.stderr,
        )
    return interface, address


def _compare_on(store: TCPStore, own: Facts, nodes: int, node_rank: int, wait: float) -> list[str]:
    """Publish this machine's facts, compare those of the others, and leave in order. Return all addresses."""
    try:
        if store.add(f"arrived {node_rank}", 1) > 1:
            raise ValueError(f"another machine has --node-rank {node_rank} already; each needs a number of its own")
        store.set(f"facts {node_rank}", json.dumps(own))
        return _compare(store, own, nodes, node_rank, wait)
    finally:
        _leave(store, nodes, node_rank)


def route_to(head: str, port: int, is_head: bool) -> tuple[str, str]:
    """Return the interface by which this machine reaches the head, and its own address on it.

    Raises:
        ValueError: no route leads to the head, or ``is_head`` is set and the address is not this machine's.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"--head {head} is no address or known name on this machine ({error.strerror})") from None
    interfaces = {
        entry.address.split("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    resolved = ipaddress.ip_address(str(target[0]).split("%")[0])
    # 127.0.0.1 is right where one machine plays all of them, to try a command
    if is_head and resolved.is_loopback and head not in ("localhost", str(resolved)):
        reachable = ", ".join(address for address in interfaces if not ipaddress.ip_address(address).is_loopback)
        raise ValueError(f"--head {head} is {resolved} here, where no other machine gets to; give one of {reachable}")
    if is_head and not resolved.is_loopback and str(resolved) not in interfaces:
        raise ValueError(
            f"--node-rank 0 belongs to the machine with the address {head}; this has {', '.join(interfaces)}"
        )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)  # sends nothing, but looks up the route
        except OSError as error:
            raise ValueError(f"no route to --head {head} from this machine: {error.strerror}") from None
        address = str(probe.getsockname()[0])
    return interfaces.get(address, "lo"), address


def _versions() -> Facts:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def _open(head: str, port: int, wait: float) -> TCPStore:
    """Open the head's store."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port} is taken on this machine ({error.strerror}); give another --port on all"
            ) from None
    try:
        store = TCPStore(
            head, port + 1, is_master=True, timeout=datetime.timedelta(seconds=wait), wait_for_workers=False
        )
    except DistNetworkError as error:
        raise ValueError(f"port {port + 1} is taken on this machine; give another --port on all ({error})") from None
    return store


def _join(head: str, port: int, wait: float) -> TCPStore:
    """Connect to the head's store from another machine, which may start before the head."""
    deadline = time.monotonic() + wait
    with told(f"waiting for the machine with --node-rank 0 to answer at {head}:{port}, for {wait:g} s at most"):
        while True:
            try:
                socket.create_connection((head, port), timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"nothing answers at {head}:{port} after {wait:g} s ({error}): was the command started with "
                        "--node-rank 0 there, with the same --port, and does a firewall let the machines connect?"
                    ) from None
            time.sleep(_POLL_SECONDS)
    return TCPStore(head, port, timeout=datetime.timedelta(seconds=wait), wait_for_workers=False)


def _compare(store: TCPStore, own: Facts, nodes: int, node_rank: int, wait: float) -> list[str]:
    """Compare every machine's facts with this one's as they arrive. Return the addresses by node rank."""
    addresses: dict[int, str] = {}
    deadline = time.monotonic() + wait

    def missing() -> str:
        return ", ".join(str(other) for other in range(nodes) if other not in addresses)

    with told(lambda: f"waiting for the machine with --node-rank {missing()}, for {wait:g} s at most"):
        while len(addresses) < nodes:
            for other in set(range(nodes)) - addresses.keys():
                if store.check([f"facts {other}"]):
                    facts = json.loads(store.get(f"facts {other}"))
                    addresses[other] = facts["address"]
                    _require_equal(own, facts, node_rank, other)
            if time.monotonic() > deadline:
                raise ValueError(f"after {wait:g} s there is no machine with --node-rank {missing()}")
            if len(addresses) < nodes:
                time.sleep(_POLL_SECONDS)
    return [address for _, address in sorted(addresses.items())]


def _require_equal(own: Facts, facts: Facts, node_rank: int, other: int) -> None:
    for name in (own.keys() | facts.keys()) - {"address"}:
        if own.get(name) != facts.get(name):
            raise ValueError(
                f"the machines differ in {name}: {own.get(name)} here (--node-rank {node_rank}), {facts.get(name)} "
                f"with --node-rank {other}; it has to be the same on all"
            )


def _leave(store: TCPStore, nodes: int, node_rank: int) -> None:
    """Leave the store. The head leaves last, because it holds the store."""
    store.add("left", 1)
    if node_rank:
        return
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while time.monotonic() < deadline:
        arrived = sum(store.check([f"facts {other}"]) for other in range(nodes))
        if store.add("left", 0) >= arrived:
            return
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
