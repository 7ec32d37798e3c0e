"""A router and K static variants: the deployed form of a network whose structure depends on its input.

    argmax     logits, *carried = router(x)      y = variants[argmax(logits)](*carried, or x where none)
    fallback   y, overflow = variants[0](x)      y = variants[1](x) where overflow > 0; no router

Every variant is an ordinary network of fixed structure, lowered like any other. The host picks one per image
by the rule in the manifest, without Python code of the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgedyn.bundle.manifest import FORWARD, ROUTER, Routing
from edgedyn.errors import ModelError


class RoutedModel(nn.Module):
    """A routed program; called like the network that it replaces, and routes each sample by itself.

    Args:
        router: x -> logits (B, K), or (logits, *carried) where the variants take ``carried`` instead of x;
            None for the rule ``fallback``.
        variants: name -> network, K of them. Without a router: first the capacity variant, which returns
            (y, overflow) and is exact while ``overflow`` (B,), the number of positions that did not fit, is
            0; then the dense variant, which is always exact.

    Raises:
        ModelError: for fewer than 2 variants, or, without a router, more; for a reserved name, or one with
            other characters than letters and digits.
    """

    def __init__(self, router: nn.Module | None, variants: Mapping[str, nn.Module]) -> None:
        super().__init__()
        odd = [name for name in variants if name in (ROUTER, FORWARD) or not name.isalnum()]
        if odd:
            raise ModelError(
                f"a variant is called {odd[0]!r}; expected letters and digits, and neither {ROUTER!r} nor "
                f"{FORWARD!r}. Rename it."
            )
        if len(variants) < 2 or (router is None and len(variants) != 2):
            raise ModelError(
                f"a routed program got {len(variants)} variants {list(variants)}; expected at least 2, and "
                "without a router exactly 2: the capacity variant and the dense one."
            )
        self.router = router
        self.variants = nn.ModuleDict(variants)

    @property
    def rule(self) -> str:
        """``argmax`` or ``fallback``."""
        return "fallback" if self.router is None else "argmax"

    def forward(self, x: Tensor) -> Tensor:
        """Run the variant that each sample of x (B, ...) is routed to."""
        return torch.cat([self._run(sample) for sample in torch.split(x, 1)])

    def route(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the router's logits (B, K) and the inputs of the variants.

        Raises:
            ModelError: when there is no router, or it does not return one logit per variant.
        """
        if self.router is None:
            raise ModelError("this routed program has no router; its rule is fallback. Run its variants.")
        outputs = self.router(x)
        logits, *carried = outputs if isinstance(outputs, tuple) else (outputs,)
        if logits.shape != (x.shape[0], len(self.variants)):
            raise ModelError(
                f"the router returns logits {tuple(logits.shape)} for {len(self.variants)} variants "
                f"({', '.join(self.variants)}) and a batch of {x.shape[0]}; expected "
                f"{(x.shape[0], len(self.variants))}. Give the gate one output per variant."
            )
        return logits, tuple(carried) or (x,)

    def _run(self, x: Tensor) -> Tensor:
        variants = list(self.variants.values())
        if self.router is None:
            y, overflow = variants[0](x)
            return y if not overflow.any() else variants[1](x)  # type: ignore[no-any-return]
        logits, carried = self.route(x)
        return variants[int(logits.argmax(1))](*carried)  # type: ignore[no-any-return]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the static networks of a canonical model by program: ``forward``, or router and variants."""
    if not isinstance(model, RoutedModel):
        return {FORWARD: model}
    router = {} if model.router is None else {ROUTER: model.router}
    return router | dict(model.variants.items())


def part_inputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, ...]]:
    """Return the inputs of every part for one call of the model; the router runs once.

    Raises:
        ModelError: when the router does not return one logit per variant.
    """
    by_part = dict.fromkeys(parts(model), inputs)
    if isinstance(model, RoutedModel) and model.router is not None:
        with torch.no_grad():
            by_part |= dict.fromkeys(model.variants, model.route(*inputs)[1])
    return by_part


def routing_of(model: nn.Module) -> Routing | None:
    """Return a model's routing as the manifest describes it, or None for a model of one part."""
    if not isinstance(model, RoutedModel):
        return None
    router = "" if model.router is None else ROUTER
    return Routing(model.rule, router, tuple(model.variants))
