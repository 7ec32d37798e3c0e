"""What holds for every test: one thread, because small tensors cost more to share out than to compute."""

from __future__ import annotations

import os

# Read when torch is first imported, and by the processes that tests start. On a busy machine two threads wait
# for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
