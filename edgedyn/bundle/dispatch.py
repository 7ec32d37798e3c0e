"""Dispatch of a routed program on the device: the router picks a variant, the variant runs. Needs numpy only.

    argmax     logits, *carried = router(x)      y = variant[argmax(logits)](*carried, or x where none)
    fallback   y, overflow = variant[0](x)       y = variant[1](x) where overflow > 0; no router

The host's side, which makes the variants, is ``edgedyn.layers.RoutedModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedyn.bundle.manifest import FORWARD, Routing
from edgedyn.errors import BundleError

Run = Callable[..., list[np.ndarray]]


@dataclass(frozen=True)
class Decision:
    """The decision for one input.

    Attributes:
        index: the variant, as the rule picks it.
        scores: the router's logits (K,), or the overflow (1,) of the first variant.
    """

    index: int
    scores: np.ndarray

    @property
    def margin(self) -> float:
        """Distance to the other decision: best minus second logit, or positions beyond the capacity."""
        if len(self.scores) < 2:
            return float(self.scores[0])
        second, best = np.sort(self.scores)[-2:]
        return float(best - second)


class Dispatcher:
    """The programs of a bundle as one: call it with arrays of batch 1, it returns the list of outputs.

    Args:
        runs: name -> ``run(*arrays) -> [arrays]`` of every program.
        routing: None for the one program ``forward``.
    """

    def __init__(self, runs: Mapping[str, Run], routing: Routing | None = None) -> None:
        self.runs, self.routing = runs, routing

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Decide and run."""
        return self.run(*arrays)[0]

    def run(self, *arrays: np.ndarray, forced: int | None = None) -> tuple[list[np.ndarray], Decision | None]:
        """Return the outputs and the decision; ``forced`` overrides which variant runs.

        Raises:
            BundleError: when the router does not return one finite logit per variant.
        """
        if self.routing is None:
            return self.runs[FORWARD](*arrays), None
        variants = [self.runs[name] for name in self.routing.variants]
        if self.routing.rule == "fallback":
            y, overflow = variants[0](*arrays)
            fits = overflow.max() <= 0  # not where it is NaN: the dense variant has no capacity
            decision = Decision(int(not fits), np.asarray(overflow, np.float32).reshape(-1))
            index = decision.index if forced is None else forced
            return ([y] if index == 0 else variants[1](*arrays)), decision
        logits, *carried = self.runs[self.routing.router](*arrays)
        scores = np.asarray(logits, np.float32).reshape(-1)
        if len(scores) != len(variants) or not np.isfinite(scores).all():
            raise BundleError(
                f"the router gave {scores.tolist()} for {len(variants)} variants "
                f"({', '.join(self.routing.variants)}); expected one finite logit each. Build it again."
            )
        decision = Decision(int(scores.argmax()), scores)
        chosen = variants[decision.index if forced is None else forced]
        return chosen(*(carried or arrays)), decision


def load_programs(
    load: Callable[[Path, str], Run], folder: Path, programs: Mapping[str, str], routing: Routing | None
) -> Dispatcher:
    """Load every program of a folder.

    Args:
        load: a target's ``load``.
        folder: where the files stand.
        programs: program -> file.
        routing: as for ``Dispatcher``.
    """
    return Dispatcher({name: load(folder / file, name) for name, file in programs.items()}, routing)
