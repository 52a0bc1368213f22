"""Two hosts on this machine: Linux namespaces with a network, processes and a name each, joined by one Ethernet link.

They serve to test what starts on several machines, and `tc` can make their link as slow as a real one. They share the
file system, as machines of a cluster do, and this machine's cores and memory. They need root and iproute2. No host
outlives this process: it ends when the pipe to it closes, together with its processes and its end of the link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # these exist inside the namespaces only
LINK = "link0"
_NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # includes the folders of ip, tc and sshd
# A bucket of a few packets. The Gram matrices of a small model (100 KB) would cross a larger one without delay.
BURST_BYTES = 16_384
_KEPT_OUTPUT = 6000


@dataclasses.dataclass(frozen=True)
class Host:
    """A host, known by the process that keeps its namespaces."""

    name: str
    address: str
    pid: int

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command line that runs a command on this host, as root."""
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--", *map(str, arguments)]

    def run(self, *arguments: str | Path) -> str:
        """Run a short command on this host and return what it printed."""
        done = subprocess.run(self.command(*arguments), env=_environment({}), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(map(str, arguments))} failed: {done.stderr.strip()}")
        return done.stdout

    def sent_bytes(self) -> int:
        """Return the bytes that this host has sent on the link so far, headers included."""
        return int(self.run("cat", f"/sys/class/net/{LINK}/statistics/tx_bytes"))


def refusal() -> str:
    """Return why hosts cannot be made here, or ''."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "tc") if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found: install util-linux and iproute2"
    command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(command, env=_environment({}), capture_output=True, text=True)
    return f"no network namespaces here (they need root): {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_hosts(rate: str = "") -> Iterator[tuple[Host, Host]]:
    """Make hosts ``node0`` and ``node1``, which reach only each other, by name and address.

    Args:
        rate: rate of the link in each direction, as `tc` writes it ("100mbit"); empty: as fast as the machine copies.

    Raises:
        RuntimeError: the namespaces cannot be made; `refusal` returns the reason.
    """
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_host(index, Path(folder))) for index in range(2))
        first.run("ip", "link", "add", LINK, "type", "veth", "peer", "name", "peer0")
        # runs outside: ip takes a process id, and the one known here means nothing inside the namespace
        outside = ["nsenter", f"--target={first.pid}", "--net", "--", "ip", "link", "set", "peer0"]
        subprocess.run([*outside, "netns", str(second.pid)], env=_environment({}), check=True)
        second.run("ip", "link", "set", "peer0", "name", LINK)
        for host in (first, second):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", LINK)
            host.run("ip", "link", "set", LINK, "up")
            if rate:
                bucket = ["tbf", "rate", rate, "burst", str(BURST_BYTES), "latency", "200ms"]
                host.run("tc", "qdisc", "add", "dev", LINK, "root", *bucket)
        yield first, second


@contextlib.contextmanager
def _host(index: int, folder: Path) -> Iterator[Host]:
    """Make one host without its link. ``folder`` gets its files."""
    name = f"node{index}"
    hosts = folder / "hosts"
    lines = [f"{address} node{number}" for number, address in enumerate(ADDRESSES)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    setup = f"""
        hostname {name}
        mount --bind {hosts} /etc/hosts
        mount -t sysfs sysfs /sys
        mount -t tmpfs tmpfs /dev/shm
        ip link set lo up
        echo ready
        read -r _
    """
    command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-e", "-c", setup]
    # however this process ends, its end of the pipe closes: then `read` returns, and the host ends
    keeper = subprocess.Popen(
        command, env=_environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert keeper.stdout is not None and keeper.stderr is not None
        if keeper.stdout.readline() != "ready\n":
            raise RuntimeError(f"cannot make a network namespace: {keeper.stderr.read().strip()}")
        (inside,) = psutil.Process(keeper.pid).children()
        yield Host(name, ADDRESSES[index], inside.pid)
    finally:
        keeper.kill()  # --kill-child ends the host's first process, and with it all others
        keeper.communicate()


def run_on(
    hosts: Sequence[Host], commands: Sequence[Sequence[str | Path]], timeout_s: float, **environment: str
) -> list[tuple[int, str]]:
    """Run one command on each host at the same time. Return exit codes and output, in the order of the hosts.

    A command that still runs when the time is up is killed, and has the exit code 124.
    """
    with contextlib.ExitStack() as stack:
        processes, logs = [], []
        for host, command in zip(hosts, commands, strict=True):
            logs.append(stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")))
            process = subprocess.Popen(
                host.command(*command), env=_environment(environment), stdout=logs[-1], stderr=subprocess.STDOUT
            )
            processes.append(stack.enter_context(_killed(process)))
        deadline = time.monotonic() + timeout_s
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(124)
        return list(zip(codes, [_tail(log) for log in logs], strict=True))


@contextlib.contextmanager
def _killed(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill a process and its descendants at the end, if they still run."""
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
        process.kill()
        process.wait()


def _tail(log: object) -> str:
    log.seek(0)
    return log.read()[-_KEPT_OUTPUT:]


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a shell with an active virtual environment, without settings of interfaces."""
    inherited = {name: value for name, value in os.environ.items() if "_SOCKET_IFNAME" not in name}
    return {
        **inherited,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        **changes,
    }
