"""Benchmarks: run one with `python -m tests.benchmarks.NAME`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log; read when torch is imported
