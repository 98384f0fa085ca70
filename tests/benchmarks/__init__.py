"""Benchmarks: run one with `python -m tests.benchmarks.NAME`."""

import os

# both are read when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in the workers; see `trainer.run_config`
