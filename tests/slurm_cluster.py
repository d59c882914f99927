"""A real Slurm of two one-core nodes, n1 and n2, on this machine, wholly below a folder of its own."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NODES = ("n1", "n2")
_PROGRAMS = ("munged", "slurmctld", "slurmd")
_SECONDS_TO_START = 30.0
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
MpiDefault=none
ProctrackType=proctrack/linuxproc
SwitchType=switch/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Say why no Slurm can be started here, None if it can."""
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} missing: install slurm-wlm and munge"
    return None if os.geteuid() == 0 else f"slurmd starts jobs as root only, this is {getpass.getuser()}"


class Cluster:
    """Commands of the running Slurm, and the environment in which they find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *arguments: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            arguments, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """The jobs that wait or run; one of an array as ARRAY_INDEX."""
        return self.command("squeue", "--noheader", "--array", "--format=%i").split()

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as JobState or Restarts."""
        words = self.command("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def wait_for(self, job: str, *states: str, seconds: float = 90) -> None:
        """Wait until the job is in one of the states."""
        wait_until(lambda: self.field(job, "JobState") in states, f"job {job} {' or '.join(states)}", seconds)


def wait_until(condition, what: str, seconds: float = 60) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for: {what}"
        time.sleep(0.1)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons, yield the cluster, cancel its jobs and stop the daemons whatever happens."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)  # munged wants its socket where everybody may look and only its owner may write
        stack.callback(_end_what_is_left, folder)
        cluster = Cluster(folder)
        _write_files(folder)
        key, seed = f"--key-file={folder / 'munge.key'}", f"--seed-file={folder / 'munge.seed'}"
        others = [f"--socket={folder / 'munge.socket'}", f"--pid-file={folder / 'munged.pid'}"]
        stack.enter_context(_daemon(cluster, "munged", "--foreground", "--force", key, seed, *others))
        wait_until((folder / "munge.socket").exists, "munged's socket", _SECONDS_TO_START)
        stack.enter_context(_daemon(cluster, "slurmctld", "-D", "-c"))
        for node in NODES:
            stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", node))
        wait_until(lambda: _idle_nodes(cluster) == len(NODES), f"two idle nodes; see {folder}", _SECONDS_TO_START)
        stack.callback(_cancel_all, cluster)
        yield cluster


def cluster_or_skip() -> Iterator[Cluster]:
    """For a fixture: a running Slurm, whose daemons are gone at the end; skips, saying why, where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    with running_cluster() as running:
        yield running
        folder = running.folder
    assert not _processes_of(folder), "a daemon was left behind"


def _write_files(folder: Path) -> None:
    ports = []
    with ExitStack() as stack:  # all are held until all are known, so that no two are the same
        for _ in range(3):
            ports.append(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
    (folder / "slurm.conf").write_text(
        _CONF.format(folder=folder, host=socket.gethostname().split(".")[0], ports=ports)
    )
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()


@contextmanager
def _daemon(cluster: Cluster, *arguments: str) -> Iterator[None]:
    with (cluster.folder / f"{arguments[0]}.log").open("ab") as output:
        process = subprocess.Popen(
            arguments,
            env=os.environ | cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests: the daemons are stopped after the jobs
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(cluster: Cluster) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "-N", "-o", "%T"],
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.split().count("idle")


def _cancel_all(cluster: Cluster) -> None:
    cluster.command("scancel", f"--user={getpass.getuser()}")
    wait_until(lambda: not cluster.jobs(), "no job left", 30)


def _processes_of(folder: Path) -> list[int]:
    """The processes whose environment or command line names the folder, but for this one."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                about = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in about:
                found.append(int(process.name))
    return found


def _end_what_is_left(folder: Path) -> None:
    for pid in _processes_of(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
