"""The test hosts leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hosts

pytestmark = pytest.mark.cluster

MAKER = """
import signal
from tests.hosts import started
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
with started(1) as hosts:
    print(hosts.shared.parent, hosts[0].init, flush=True)
    hosts[0].run("sleep 600 & sleep 600")
"""


def test_interrupted_test_leaves_no_host() -> None:
    """Ctrl-C while a command runs on the host: no process, namespace or file is left."""
    reason = hosts.missing()
    if reason:
        pytest.skip(reason)
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER], cwd=hosts.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    folder, init = maker.stdout.readline().split()
    assert Path(f"/proc/{init}").exists()
    maker.send_signal(signal.SIGINT)
    errors = maker.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in errors
    assert not Path(folder).exists()
    assert not Path(f"/proc/{init}").exists()
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"msrn-{maker.pid}-" not in names
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and folder in _arguments(pid)]


def _arguments(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return ""
