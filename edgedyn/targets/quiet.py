"""Silence the log messages and warnings of torch, torchao, NNCF and ExecuTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries below the targets inside a ``with`` block; errors still show."""
    logging.basicConfig(level=logging.ERROR)
    for name in ("torchao", "nncf", "executorch", "torch", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch sets this one's level itself when it is imported
    logging.getLogger("torch.fx.experimental.symbolic_shapes").addFilter(
        lambda record: record.levelno >= logging.ERROR
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
