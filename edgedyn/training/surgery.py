"""Cut the channels of a chain of convolutions to those of highest energy.

    chain     conv, [BatchNorm], activation, conv, ..., conv   dense convolutions, activations without weights
    energy    E_k[c] = mean over images and pixels of a_k[c]^2    a_k: what enters convolution k + 1

Of each convolution but the last, the N output channels with the highest energy stay, in their order; the next
convolution loses the inputs that are gone. All other weights are copied exactly. BatchNorm is folded first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgedyn.errors import TrainingError


def cut_channels(chain: nn.Sequential, channels: int, run: Callable[[], object]) -> nn.Sequential:
    """Return a chain of thinner convolutions.

    Args:
        chain: in evaluation mode; not changed.
        channels: number N of channels between two convolutions, at most as many as there are.
        run: runs the chain, or the network that it is a part of, on a few images; called once.

    Returns:
        Convolutions and activations, without BatchNorm; its input and output have the channels of before.

    Raises:
        TrainingError: when the chain has another kind of layer, or fewer channels, or ``run`` passes it by.
    """
    layers = fold_norms(chain)
    convolutions = _convolutions(chain)
    narrow = min((conv.out_channels for conv in convolutions[:-1]), default=0)
    if not 1 <= channels <= narrow:
        raise TrainingError(
            f"the chain cannot be cut to {channels} channels; expected 1 to {narrow}. Choose fewer channels."
        )
    energies = channel_energies(chain, run)
    kept = [None, *(energy.topk(channels).indices.sort().values for energy in energies), None]
    bounds = iter(pairwise(kept))
    return nn.Sequential(
        *(
            _select(layer, *next(bounds)) if isinstance(layer, nn.Conv2d) else copy.deepcopy(layer)
            for layer in layers
        )
    )


def channel_energies(chain: nn.Sequential, run: Callable[[], object]) -> list[Tensor]:
    """Return the energy of each output channel, (O,) float64, of each convolution but the last.

    Raises:
        TrainingError: when ``run`` passes the chain by.
    """
    energies: list[list[Tensor]] = []
    hooks = []
    for conv in _convolutions(chain)[1:]:
        found: list[Tensor] = []
        energies.append(found)

        def measure(module: nn.Module, args: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            found.append(args[0].detach().double().square().mean((0, 2, 3)))

        hooks.append(conv.register_forward_pre_hook(measure))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if not all(energies):
        raise TrainingError(
            "the run did not reach the chain; expected a run of the network that contains it."
        )
    return [torch.stack(found).mean(0) for found in energies]


def fold_norms(chain: nn.Sequential) -> list[nn.Module]:
    """Return the layers of a chain, with every BatchNorm folded into a copy of the convolution before it.

    Raises:
        TrainingError: for a layer that is no dense convolution, BatchNorm behind one, or plain activation.
    """
    layers: list[nn.Module] = []
    behind: nn.Module | None = None
    for k, layer in enumerate(chain):
        plain = layers and not list(layer.children()) and not layer.state_dict()
        if isinstance(layer, nn.BatchNorm2d) and isinstance(behind, nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(behind.eval(), layer.eval())
        elif (isinstance(layer, nn.Conv2d) and layer.groups == 1) or plain:
            layers.append(layer)
        else:
            raise TrainingError(
                f"layer {k} of the chain is {layer}; expected dense convolutions, BatchNorm directly behind "
                "them and activations without weights. Cut a part of the network that has only these."
            )
        behind = layer
    return layers


def _convolutions(chain: nn.Sequential) -> list[nn.Conv2d]:
    return [layer for layer in chain if isinstance(layer, nn.Conv2d)]


def _select(conv: nn.Conv2d, inputs: Tensor | None, outputs: Tensor | None) -> nn.Conv2d:
    """Copy a convolution with some of its channels; None keeps all."""
    thin = copy.deepcopy(conv)
    for name, tensor in list(thin.named_parameters()):
        kept = tensor.detach()
        kept = kept if outputs is None else kept[outputs]
        kept = kept[:, inputs] if inputs is not None and kept.dim() == 4 else kept
        setattr(thin, name, nn.Parameter(kept.clone()))
    thin.out_channels, thin.in_channels = thin.weight.shape[:2]
    return thin
