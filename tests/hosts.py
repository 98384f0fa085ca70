"""Test hosts on this machine: each is a network, process and mount namespace with an SSH server in it.

Their traffic stays among them, on a bridge in its own namespace. Each host sees this machine's files, and keeps its own changes to them;
`SHARED` is one folder for all hosts. Needs root, iproute2, openssh-server and rsync.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = "/mnt/msrn"  # on every host
PATIENCE = 400.0  # seconds to wait for what takes a few on an idle machine
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "rsync")

_SET_UP_HOST = r"""
set -eu
base=$1; root=$base/root; address=$2; name=$3; key=$4; shared=$5; path=$6; home=$7
mount --make-rprivate /
mount -t tmpfs -o size=1g tmpfs $base
mkdir $base/upper $base/work $root
mount -t overlay overlay -o lowerdir=/,upperdir=$base/upper,workdir=$base/work $root
mount --rbind /dev $root/dev
mount -t tmpfs -o size=2g tmpfs $root/dev/shm
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t tmpfs tmpfs $root/run
mkdir -p $root/run/sshd $root/$home/.ssh $root/mnt/msrn
rm -rf $root/tmp/ray $root/$home/.ray
mount --bind $shared $root/mnt/msrn
hostname $name
printf '127.0.0.1 localhost\n%s %s\n' $address $name > $root/etc/hosts
cp $key $root/$home/.ssh/id; cp $key.pub $root/$home/.ssh/authorized_keys
chmod 700 $root/$home/.ssh; chmod 600 $root/$home/.ssh/*
printf 'export PATH=%s:$PATH\n' $path >> $root/$home/.bashrc
ssh-keygen -q -t ed25519 -N '' -f $root/run/sshd/host_key
exec chroot $root /usr/sbin/sshd -D -e -h /run/sshd/host_key -o PermitRootLogin=yes -o StrictModes=no -o UsePAM=no -o UseDNS=no \
  -o MaxSessions=50 -o MaxStartups=50 -o PidFile=none
"""


@dataclass
class Host:
    """A test host.

    Attributes:
        name: its host name.
        address: its IP address on the bridge.
        port: its plug on the bridge: namespace and interface.
        init: its first process, by this machine's number. When it ends, every process of the host ends.
    """

    name: str
    address: str
    port: tuple[str, str]
    init: int

    def run(self, command: str, timeout: float = PATIENCE, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command line on the host, in a login shell; `stdout` holds its output and its errors."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--net", "--pid", "--root", "--wd"]
        completed = subprocess.run(
            [*enter, "bash", "--login", "-c", f"cd; source ~/.bashrc; {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            cwd="/",
        )
        assert completed.returncode == 0 or not check, f"{self.name}: {command}\n{completed.stdout}"
        return completed

    def from_here(self, path: str) -> Path:
        """Return an absolute path of the host as this machine sees it; symbolic links with absolute targets lead astray."""
        return Path(f"/proc/{self.init}/root{path}")

    def processes(self, pattern: str) -> list[int]:
        """Return the processes whose command line matches the regular expression, by the host's numbers."""
        listed = [line.split(maxsplit=1) for line in self.run("ps -ewwo pid=,args=").stdout.splitlines()]
        return [int(pid) for pid, command in listed if re.search(pattern, command) and "<defunct>" not in command]

    def kill(self, pattern: str) -> None:
        """Send SIGKILL to all such processes; at least one must exist."""
        pids = self.processes(pattern)
        assert pids, f"{self.name}: no process {pattern}"
        # the others may end as soon as the first does
        self.run(f"kill -KILL {' '.join(map(str, pids))}", check=False)

    def cut_off(self) -> None:
        """Take the network away: packets of and to the host are lost, and no one is notified."""
        _ip("-n", self.port[0], "link", "set", self.port[1], "nomaster")

    def reconnect(self) -> None:
        """Give the network back."""
        _ip("-n", self.port[0], "link", "set", self.port[1], "master", "br0")


@dataclass
class Hosts:
    """All test hosts.

    Attributes:
        hosts: by number.
        shared: `SHARED` as this machine sees it.
        key: the private key that opens them.
    """

    hosts: list[Host]
    shared: Path
    key: Path

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]


def missing() -> str | None:
    """Return why this machine cannot make test hosts; None if it can."""
    if os.geteuid() != 0:
        return "test hosts need root"
    absent = [program for program in PROGRAMS if _which(program) is None]
    if absent:
        return f"test hosts need {', '.join(absent)} (Debian: iproute2 util-linux openssh-server rsync)"
    probe = f"msrn-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextmanager
def started(number: int) -> Iterator[Hosts]:
    """Start hosts 10.77.0.2, 10.77.0.3, ...; at the end, remove all of them and their processes."""
    folder = Path(tempfile.mkdtemp(prefix="msrn-hosts-"))
    key, shared, bridge = folder / "key", folder / "shared", f"msrn-{os.getpid()}-b"
    hosts: list[Host] = []
    shells: list[subprocess.Popen[bytes]] = []
    namespaces = [bridge]
    try:
        shared.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for index in range(number):
            address, namespace, name = f"10.77.0.{index + 2}", f"msrn-{os.getpid()}-{index}", f"host-{index}"
            base, log = folder / name, folder / f"{name}.log"
            base.mkdir()
            namespaces.append(namespace)
            _connect(namespace, bridge, index, address)
            settings = [base, address, name, key, shared, Path(sys.executable).parent, Path.home()]
            shells.append(_start_shell(namespace, [str(setting) for setting in settings], log))
            init = _first_process(shells[-1], log)
            hosts.append(Host(name, address, (bridge, f"v{index}"), init))
        yield Hosts(hosts, shared, key)
    finally:
        for shell in shells:
            _end(shell)
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace])
        shutil.rmtree(folder, ignore_errors=True)


def _connect(namespace: str, bridge: str, index: int, address: str) -> None:
    """Make a host's network namespace and plug it into the bridge."""
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", bridge, "link", "add", f"v{index}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", bridge, "link", "set", f"v{index}", "master", "br0", "up")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")


def _start_shell(namespace: str, settings: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the process that makes a host and becomes its SSH server."""
    inside = [
        *("setpriv", "--pdeathsig", "KILL"),  # a killed test run leaves no host
        *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
        *("bash", "-c", _SET_UP_HOST, "host"),
    ]
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace, *inside, *settings],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def _end(shell: subprocess.Popen[bytes]) -> None:
    """End a host and wait for that: its process 1, a child of the shell, takes every process of the host with it."""
    first = _children(shell)
    shell.send_signal(signal.SIGKILL)  # --kill-child
    shell.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in first):
        time.sleep(0.05)


def _children(shell: subprocess.Popen[bytes]) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()]
    except FileNotFoundError:  # the shell has ended
        return []


def _first_process(shell: subprocess.Popen[bytes], log: Path) -> int:
    """Return the host's process 1 as soon as its SSH server listens."""
    end = time.monotonic() + 120
    while "Server listening" not in log.read_text():
        assert shell.poll() is None, f"a test host did not start: {log.read_text()}"
        assert time.monotonic() < end, f"a test host does not come up: {log.read_text()}"
        time.sleep(0.05)
    (first,) = _children(shell)
    return first


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _environment() -> dict[str, str]:
    """Return an environment without this process's Ray."""
    return {
        "HOME": str(Path.home()),
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
    }
