"""What holds for every test: one thread, because small tensors cost more to share out than to compute."""

from __future__ import annotations

import os

# Read when torch is first imported, and by the processes that tests start. Two threads wait for each other on
# a busy machine: tests/test_layers.py took 35 s with two, 6 s with one, on 2 x86 cores beside a training run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
