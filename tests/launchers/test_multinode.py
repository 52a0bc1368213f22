"""launchers/multinode.sh on two hosts with addresses of their own, against the reference trajectories."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from benchmarks.harness.two_hosts import ADDRESSES, LINK, SYSTEM_PATH, Host, refusal, run_on, two_hosts
from launchers.cluster import meeting
from tests.support.launchers import REPOSITORY, free_port, launch, micro_model, short_training, write_records
from tests.support.workloads import FACTOR_TOLERANCE, LOSS_TOLERANCE, reference_dir, worst_factor_error

MULTINODE = REPOSITORY / "launchers" / "multinode.sh"
PROGRAM = REPOSITORY / "tests" / "support" / "parity_program.py"
CASES = ("lora", "reflora", "reflora-s")
_REFUSAL = refusal()
needs_hosts = pytest.mark.skipif(bool(_REFUSAL), reason=_REFUSAL)
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def _on_both(hosts: tuple[Host, Host], launcher: str, arguments: list[str | Path], processes: int) -> None:
    """The same command on both, but for the rank, as an engineer would type it."""
    fixed = ["--nodes", "2", "--head", hosts[0].address, "--wait", "120"]
    commands = [["bash", MULTINODE, launcher, "--node-rank", str(rank), *fixed, *arguments] for rank in range(2)]
    results = run_on(hosts, commands, timeout_s=400, PROCESSES=str(processes), **_OFFLINE)
    assert [code for code, _ in results] == [0, 0], "\n".join(output for _, output in results)


def _check_against_the_reference(folder: Path, hosts: tuple[Host, Host], processes: int) -> None:
    """Every rank followed the reference, half of them on each host, and what they exchanged crossed the link."""
    written = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2 * processes)]
    assert [rank["host"] for rank in written] == ["node0"] * processes + ["node1"] * processes
    for rank in written:
        assert rank["world_size"] == 2 * processes and rank["interface"] == LINK
        assert len(rank["outcomes"]) == len(CASES)
        for outcome in rank["outcomes"]:
            assert outcome["factor_error"] <= FACTOR_TOLERANCE and outcome["loss_error"] <= LOSS_TOLERANCE, outcome
            if outcome["label"] != "reflora":  # a check that holds for another method's factors would prove nothing
                assert outcome["distance_to_other"] > 1e-3, outcome
    # 8 MB and more were measured; ranks that only find each other exchange 10 KB
    assert all(host.sent_bytes() > 1e6 for host in hosts)


@needs_hosts
@pytest.mark.parametrize(
    ("launcher", "engine", "processes"),
    [
        ("deepspeed", "zero3", 1),
        *(
            pytest.param(*case, marks=pytest.mark.all_ranks)
            for case in [
                ("torchrun", "fsdp2", 1),
                ("deepspeed", "zero3", 2),
                ("torchrun", "fsdp2", 2),
                ("torchrun", "fsdp2-hsdp", 2),
                ("accelerate", "as-launched", 1),
                ("accelerate", "as-launched", 2),
            ]
        ),
    ],
)
def test_training_across_two_hosts_follows_the_reference(
    hosts: tuple[Host, Host], tmp_path: Path, launcher: str, engine: str, processes: int
) -> None:
    _on_both(hosts, launcher, ["--script", PROGRAM, engine, tmp_path, *CASES], processes)
    _check_against_the_reference(tmp_path, hosts, processes)


def test_arguments_reach_the_hosts_of_a_hostfile_as_they_are() -> None:
    """Through DeepSpeed's pdsh runner, which escapes little, and a shell on each host."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    wanted = ["", "$HOME", "a b", 'say "$HOME" \\ `id`', "data(1).jsonl", "it's", "*", "a;b", "x=1,2", 'one"', "ü é"]
    quote = f'. {REPOSITORY}/launchers/environment.sh; for a; do quoted_for_pdsh "$a"; printf "\\0"; done'
    printed = subprocess.run(["bash", "-c", quote, "bash", *wanted], capture_output=True, text=True, check=True).stdout
    quoted = [part.rstrip("\n") for part in printed.split("\0")[:-1]]
    sent = PDSHRunner.parse_user_args(SimpleNamespace(args=SimpleNamespace(user_args=quoted)))
    shell = ["sh", "-c", "printf '%s\\0' " + " ".join(sent)]
    remote = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert remote.stdout.split("\0")[:-1] == wanted


@needs_hosts
@pytest.mark.all_ranks
@pytest.mark.pdsh
def test_a_hostfile_starts_all_hosts_through_pdsh(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    _serve_ssh(hosts, tmp_path)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# the head first\nnode0 slots=1\n\nnode1 slots=1\n")
    command = ["bash", MULTINODE, "deepspeed", "--hostfile", hostfile, "--script", PROGRAM, "zero3", tmp_path, *CASES]
    # where the others find the reference: ssh passes nothing on
    ((code, output),) = run_on(hosts[:1], [command], 400, REFLORA_REFERENCE=str(reference_dir()), **_OFFLINE)
    assert code == 0, output
    _check_against_the_reference(tmp_path, hosts, 1)

    hostfile.write_text("node0 slots=1\nnode2 slots=1\n")
    ((code, output),) = run_on(hosts[:1], [command], 60, **_OFFLINE)
    assert code == 1 and "ssh node2 fails" in output, output


def _serve_ssh(hosts: tuple[Host, Host], folder: Path) -> None:
    """Let the hosts log in to each other with a key of their own; all files lie in ``folder``."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    server = [f"HostKey {key}", f"AuthorizedKeysFile {key}.pub", "StrictModes no", "UsePAM no", "PidFile none"]
    (folder / "sshd_config").write_text("\n".join([*server, "PasswordAuthentication no", ""]))
    client = [f"IdentityFile {key}", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR"]
    (folder / "ssh_config").write_text("\n".join(["Host *", *client, ""]))
    for host in hosts:
        host.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        host.run("mkdir", "/run/sshd")
        host.run("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
        host.run("/usr/sbin/sshd", "-f", folder / "sshd_config")


@needs_hosts
@pytest.mark.all_ranks
@pytest.mark.parametrize(
    ("launcher", "config", "engine"),
    [
        ("deepspeed", "ds_configs/zero3.json", "zero3"),
        ("accelerate", "launchers/accelerate/deepspeed_zero3.yaml", "zero3"),
        ("torchrun", None, "ddp"),
    ],
)
def test_finetune_ends_with_the_adapter_of_one_machine(
    launcher: str, config: str | None, engine: str, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The default program with the shipped configuration, from the command line to the file."""
    micro_model(tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    named = [str(REPOSITORY / config)] if config else []
    _on_both(hosts, launcher, [*named, *short_training(tmp_path, "two")], processes=1)
    script = REPOSITORY / "launchers" / f"run_{launcher}.sh"
    launch(["bash", script, *named, *short_training(tmp_path, "one")], timeout_s=280, PROCESSES="2")
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["report"]["engine"], metrics["report"]["applied_steps"]) == (2, engine, 2)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert worst_factor_error(*adapters) < 1e-6  # sums of two ranks: the same order on one machine and on two


@needs_hosts
def test_a_shaped_link_takes_as_long_as_its_rate_says() -> None:
    payload = 2_500_000  # 200 ms
    server = f"""import socket, time
listener = socket.create_server(("", 5000))
print("listening", flush=True)
connection, _ = listener.accept()
start, left = time.monotonic(), {payload}
while left:
    left -= len(connection.recv(left))
print(time.monotonic() - start)"""
    client = f"""import socket, time
deadline = time.monotonic() + 20
while True:
    try:
        connection = socket.create_connection(("{ADDRESSES[0]}", 5000))
        break
    except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.05)
connection.sendall(bytes({payload}))"""
    commands = [[sys.executable, "-c", program] for program in (server, client)]
    with two_hosts("100mbit") as pair:
        results = run_on(pair, commands, timeout_s=30)
        assert [code for code, _ in results] == [0, 0], results
        # headers cost 4 %, and the bucket lets 16 KB through at once
        assert 0.19 < float(results[0][1].split()[-1]) < 0.6
        assert payload < pair[1].sent_bytes() < 1.1 * payload


@needs_hosts
def test_hosts_and_their_processes_end_with_their_maker() -> None:
    """Also if it is killed: nothing of a test run stays behind."""
    program = """import subprocess, time
from benchmarks.harness.two_hosts import two_hosts
with two_hosts() as hosts:
    for host in hosts:
        subprocess.Popen(host.command("sleep", "1000"))
    time.sleep(1)
    print("made", flush=True)
    time.sleep(1000)"""
    maker = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None and maker.stdout.readline() == "made\n"
    made = psutil.Process(maker.pid).children(recursive=True)
    assert len([process for process in made if process.name() == "sleep"]) == 2
    maker.kill()
    maker.communicate()
    _, alive = psutil.wait_procs(made, timeout=20)
    assert alive == []


# --- what can go wrong before it starts -----------------------------------------------------------------------------

_HERE = ["--nodes", "2", "--node-rank", "0", "--head", "127.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument is deepspeed, accelerate or torchrun"),
        (["mpirun"], "not 'mpirun'"),
        (["torchrun", *_HERE[2:]], "--nodes is missing"),
        (["torchrun", *_HERE[:2], *_HERE[4:]], "--node-rank is missing"),
        (["torchrun", *_HERE[:4]], "--head is missing"),
        (["torchrun", "--nodes", "two", *_HERE[2:]], "--nodes two: give a whole number"),
        (["torchrun", "--nodes", "2", "--node-rank", "2", "--head", "a"], "--node-rank 2 is out of range: 2 machines"),
        (["torchrun", "--nodes"], "--nodes needs a value"),
        (["torchrun", *_HERE, "--port", "x"], "--port x: give a whole number"),
        (["torchrun", *_HERE, "--script", "no.py"], "--script no.py does not exist"),
        (["torchrun", "--hostfile", "/etc/hosts"], "--hostfile is the deepspeed launcher's"),
        (["deepspeed", "--hostfile", "nowhere"], "--hostfile nowhere does not exist"),
        (["deepspeed", "--hostfile", "/etc/hosts", "--nodes", "2"], "takes the place of --nodes"),
    ],
)
def test_a_wrong_command_is_refused_by_name(arguments: list[str], message: str) -> None:
    assert message in launch(["bash", MULTINODE, *arguments], timeout_s=60, expect_failure=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["accelerate", *_HERE, "launchers/accelerate/fsdp2.yaml"], "no FSDP on a CPU"),
        (["accelerate", *_HERE, "no.yaml"], "the configuration no.yaml does not exist"),
        (["deepspeed", *_HERE, "no.json"], "the configuration no.json does not exist"),
        (
            ["torchrun", "--nodes", "2", "--node-rank", "0", "--head", "192.0.2.1"],
            "the machine with the address 192.0.2.1",
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused_by_name(arguments: list[str], message: str) -> None:
    assert message in launch(["bash", MULTINODE, *arguments], timeout_s=60, expect_failure=True)


def _meet(*machines: dict[str, Any], port: int | None = None) -> list[tuple[str, str] | str]:
    """What each of several "machines" here gets back, or the message with which it is refused."""
    port = port or free_port()
    results: list[Any] = [None] * len(machines)

    def join(index: int, machine: dict[str, Any]) -> None:
        arguments = {"nodes": 2, "node_rank": index, "head": "127.0.0.1", "port": port, "wait": 2.0, "facts": []}
        try:
            results[index] = meeting.meet(**{**arguments, **machine})
        except ValueError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=join, args=pair) for pair in enumerate(machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_machines_that_agree_learn_their_interface() -> None:
    same = {"facts": ["processes=2", "launcher=deepspeed"]}
    assert _meet(same, same) == [("lo", "127.0.0.1")] * 2


@pytest.mark.parametrize("second", [{"facts": ["processes=2"]}, {"nodes": 3}])
def test_machines_that_differ_all_say_so(second: dict[str, Any]) -> None:
    first = {"facts": ["processes=1"]} if "facts" in second else {}
    name, values = ("nodes", ("2", "3")) if "nodes" in second else ("processes", ("1", "2"))
    here, there = _meet(first, second)
    assert f"differ in {name}: {values[0]} here (--node-rank 0), {values[1]} with --node-rank 1" in here
    assert f"differ in {name}: {values[1]} here (--node-rank 1), {values[0]} with --node-rank 0" in there


def test_another_version_of_a_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter([{"torch": "2.12.0"}, {"torch": "2.13.0"}])
    monkeypatch.setattr(meeting, "_versions", lambda: next(versions))
    assert all("differ in torch" in message for message in _meet({}, {}))


def test_a_machine_that_is_missing_is_named() -> None:
    (alone,) = _meet({"nodes": 3})
    assert alone == "after 2 s there is no machine with --node-rank 1, 2"


def test_a_head_that_does_not_answer_is_named() -> None:
    (alone,) = _meet({"node_rank": 1})
    assert "nothing answers at 127.0.0.1:" in alone and "refused" in alone and "firewall" in alone


def test_a_rank_given_twice_is_refused() -> None:
    results = _meet({"nodes": 3}, {"nodes": 3, "node_rank": 1}, {"nodes": 3, "node_rank": 1})
    assert "another machine has --node-rank 1 already; each needs a number of its own" in results[1:]


@pytest.mark.parametrize("offset", [0, 1])
def test_a_port_that_is_taken_is_named(offset: int) -> None:
    port = free_port()
    with socket.create_server(("", port + offset)):
        (alone,) = _meet({"nodes": 1}, port=port)
    assert f"port {port + offset} is taken on this machine" in alone


@pytest.mark.parametrize(
    ("head", "is_head", "message"),
    [
        ("not a name", False, "--head not a name is no address or known name"),
        ("192.0.2.1", True, "--node-rank 0 belongs to the machine with the address 192.0.2.1; this has 127.0.0.1"),
    ],
)
def test_a_wrong_address_is_named(head: str, is_head: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meeting.route_to(head, 29500, is_head)


def test_a_name_that_leads_back_to_the_head_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts gives the machine's own name 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match=r"--head trainer is 127\.0\.1\.1 here, where no other machine gets to"):
        meeting.route_to("trainer", 29500, is_head=True)


@needs_hosts
def test_a_head_without_a_route_is_named(hosts: tuple[Host, Host]) -> None:
    command = [sys.executable, REPOSITORY / "launchers" / "cluster" / "meeting.py", "--nodes", "2", "--node_rank", "1"]
    ((code, output),) = run_on(hosts[1:], [[*command, "--head", "10.78.0.1", "--port", "29500"]], timeout_s=60)
    assert code == 1 and "no route to --head 10.78.0.1 from this machine" in output, output


@pytest.mark.parametrize(
    "launcher",
    ["deepspeed", *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("accelerate", "torchrun"))],
)
def test_sigterm_ends_every_process_of_a_machine(tmp_path: Path, launcher: str) -> None:
    """As a preempted machine gets it; the ranks are what DeepSpeed's outer launcher would leave behind."""
    program = tmp_path / "sleeper.py"
    program.write_text(
        "import os, time\n"
        f"open(f'{tmp_path}/{{os.environ[\"RANK\"]}}', 'w').write(str(os.getpid()))\n"
        "time.sleep(1000)\n"
    )
    here = ["--nodes", "1", "--node-rank", "0", "--head", "127.0.0.1", "--port", str(free_port())]
    environment = {"PROCESSES": "2", "VIRTUAL_ENV": sys.prefix, **_OFFLINE}
    environment["PATH"] = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
    job = subprocess.Popen(["bash", MULTINODE, launcher, *here, "--script", program], env={**os.environ, **environment})
    try:
        _wait_until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"), 120)
        ranks = [psutil.Process(int((tmp_path / rank).read_text())) for rank in "01"]
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) != 0
        _wait_until(lambda: not any(rank.is_running() for rank in ranks), 30)
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []:
            process.kill()
        job.kill()
        job.wait()


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["'+__import__('os').abort()+'", "-oProxyCommand=x", "$(id)", "a;b", '"'])
def test_a_name_in_a_hostfile_is_a_name_and_nothing_that_runs(name: str, tmp_path: Path) -> None:
    for command in ("pdsh", "ssh"):  # which would say that they were called
        executable = tmp_path / command
        executable.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        executable.chmod(0o755)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"node0 slots=1\n{name} slots=1\n")
    command = ["bash", MULTINODE, "deepspeed", "--hostfile", hostfile, "--script", PROGRAM]
    printed = launch(command, timeout_s=60, expect_failure=True, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert f"'{name}' is no name of a machine" in printed
    assert not (tmp_path / "called").exists()
