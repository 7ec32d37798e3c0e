"""DS-Net: a slimmable classifier with one gate half-way, as its authors published it (arXiv 2103.13258).

    features, logits = opening(trunk(x))        at the smallest width
    y = classifier(mean_hw(rest(features)))     at the width argmax(logits)

x: (B, 3, H, W)   logits: (B, K)   y: (B, classes)

State_dict keys are the authors'. Deployed, the trunk (stem, first blocks) and the gated block's opening are
the router; each configuration is an ordinary network that takes their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.blocks import BlockOptions, Closing, SlimmableBlock, Stage
from edgedyn.layers.ddsnet.gates import make_activation, make_divisible
from edgedyn.layers.ddsnet.networks import Configurations, check_outputs, run_each
from edgedyn.layers.ddsnet.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableLinear

# slimmable_mbnet_v1_bn_uniform, the published network (act_layer swish, noskip): widths, blocks, kernel,
# stride, type, gated. Its gate has 4 outputs for 14 widths, so it runs at fixed widths only.
MBNET_14: list[list[Any]] = [
    [[16, 24], 1, 3, 2],
    [[32, 88], 1, 3, 1, "ds", False],
    [[48, 168], 2, 3, 2, "ds", False],
    [[96, 264], 2, 3, 2, "ds", False],
    [list(range(224, 641, 32)), 6, 3, 2, "ds", True],
    [list(range(736, 1153, 32)), 2, 3, 2, "ds", False],
    [],
]


class Router(nn.Module):
    """Stem, first stages and the gated block's opening: x -> (logits, features[, the block's input])."""

    def __init__(self, trunk: nn.Sequential, opening: nn.Sequential, *, keeps_input: bool) -> None:
        super().__init__()
        self.trunk, self.opening, self.keeps_input = trunk, opening, keeps_input

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Decide for images (B, 3, H, W); features are of the smallest width."""
        x = self.trunk(x)
        features, logits = self.opening(x)
        return (logits, features, x) if self.keeps_input else (logits, features)


class Tail(nn.Module):
    """One ordinary configuration of the part behind the gate; takes the features that the router returns."""

    def __init__(self, closing: Closing, rest: nn.Sequential) -> None:
        super().__init__()
        self.closing, self.rest = closing, rest

    def forward(self, *carried: Tensor) -> Tensor:
        """Return the classes' scores (B, classes)."""
        y: Tensor = self.rest(self.closing(*carried))
        return y


class DSNet(nn.Module):
    """The classifier.

    Args:
        num_classes: number of scores.
        in_chans: image channels.
        choices_cfg: the authors' list: [widths, 1, kernel, stride] for the stem; [widths, blocks, kernel,
            stride, ``ds`` or ``ir``, gated] for each stage; [] or [[channels]] for the head.
        act_layer: name of the activation.
        noskip: leave out the shortcuts of the blocks.
        se_ratio: reduced width of an attention, as a share of its widest input.
        norm_kwargs: eps, momentum, affine of the norms.
        bias: whether convolutions have an offset.
        has_head: False leaves the head out.
        gate_outputs: logits of the gate; the authors' has 4, whatever the number of widths.

    Raises:
        ModelError: for rows of other lengths, widths that are not increasing, an unknown type, or stages
            behind the gate of another number of widths.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        choices_cfg: Sequence[Sequence[Any]] = MBNET_14,
        *,
        act_layer: str = "relu",
        noskip: bool = False,
        se_ratio: float = 0.25,
        norm_kwargs: Mapping[str, Any] | None = None,
        bias: bool = False,
        has_head: bool = True,
        gate_outputs: int = 4,
    ) -> None:
        super().__init__()
        norms = dict(norm_kwargs or {})
        _check_choices(choices_cfg)
        (widths, _, kernel_size, stride), *stages, head = choices_cfg
        self.conv_stem = SlimmableConv2d(in_chans, widths, kernel_size, stride=stride, bias=bias)
        self.bn1 = SlimmableBatchNorm2d(widths, **norms)
        self.act1 = make_activation(act_layer)
        self.blocks = nn.ModuleList()
        for out_widths, blocks, kernel_size, stride, stage_type, gated in stages:
            options = BlockOptions(
                kernel_size=kernel_size,
                stride=stride,
                act_layer=act_layer,
                noskip=noskip,
                se_ratio=se_ratio,
                norm_kwargs=norms,
                bias=bias,
                gate_outputs=gate_outputs if gated else 0,
            )
            self.blocks.append(Stage(stage_type, widths, out_widths, blocks, options))
            widths = out_widths
        self.conv_head: SlimmableConv2d | None = None
        if has_head and head:
            channels = head[0][-1]
            self.conv_head = SlimmableConv2d(widths, channels, 1, bias=bias)
            self.bn2 = SlimmableBatchNorm2d(channels, **norms)
            self.act2 = make_activation(act_layer)
            widths = [channels]
        self.classifier = SlimmableLinear(widths, num_classes)
        self.lists = [
            self.conv_stem.out_channels_list,
            *(s.first_block.out_channels_list for s in self.stages),
        ]
        self.gated = [k for k, stage in enumerate(self.stages) if stage.first_block.gate.outputs]
        self.configurations = self._configurations()

    @property
    def stages(self) -> list[Stage]:
        """All stages in order."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def largest(self) -> tuple[int, ...]:
        """The largest width of every list, for training; the gate never picks it for the stages before it."""
        return tuple(widths[-1] for widths in self.lists)

    def forward(self, x: Tensor, choice: int | None = None) -> Tensor:
        """Return the scores (B, classes) of a configuration; ``None`` lets the gate pick one.

        Raises:
            ModelError: when ``choice`` is None and the gate cannot pick.
        """
        if choice is not None:
            return self.run_widths(x, self.configurations[choice])
        return run_each(self.logits(x), [x], self)

    def every_path(self, x: Tensor) -> None:
        """Run every configuration on x, so that every BatchNorm sees it."""
        for choice in range(len(self.configurations)):
            self(x, choice)

    def run_widths(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the scores (B, classes) at one width for the stem and for every stage."""
        x = self.act1(self.bn1(self.conv_stem(x, widths[0])))
        for stage, width in zip(self.stages, widths[1:], strict=True):
            x = stage(x, width)
        if self.conv_head is not None:
            x = self.act2(self.bn2(self.conv_head(x, self.conv_head.out_channels)))
        scores: Tensor = self.classifier(x.mean((2, 3)))
        return scores

    def logits(self, x: Tensor) -> Tensor:
        """Return the gate's logits (B, K) for images.

        Raises:
            ModelError: when there is no gate that can pick a configuration.
        """
        gated = self._check_gated()
        widths = self.configurations[0]
        x = self.act1(self.bn1(self.conv_stem(x, widths[0])))
        for stage, width in zip(self.stages[:gated], widths[1:], strict=False):
            x = stage(x, width)
        return self.stages[gated].first_block.logits(x)

    def static(self, choice: int) -> nn.Module:
        """Return the ordinary network of one configuration: images to scores."""
        widths = self.configurations[choice]
        blocks = [block.static(i, o) for block, i, o in self._walk(widths)]
        return nn.Sequential(*self._static_stem(widths[0]), *blocks, *self._static_head(widths[-1]))

    def router(self) -> Router:
        """Return the ordinary trunk with the gate.

        Raises:
            ModelError: when there is no gate that can pick a configuration.
        """
        gate, walk, widths = self._gated_block(), self._walk(self.configurations[0]), self.configurations[0]
        trunk = [block.static(i, o) for block, i, o in walk[:gate]]
        block, in_channels, _ = walk[gate]
        return Router(
            nn.Sequential(*self._static_stem(widths[0]), *trunk),
            block.static_opening(in_channels),
            keeps_input=not block.options.noskip,
        )

    def tail(self, choice: int) -> Tail:
        """Return the ordinary network of one configuration behind the gate."""
        widths = self.configurations[choice]
        gate, walk = self._gated_block(), self._walk(widths)
        block, in_channels, out_channels = walk[gate]
        rest = [block.static(i, o) for block, i, o in walk[gate + 1 :]]
        closing = block.static_closing(in_channels, out_channels)
        return Tail(closing, nn.Sequential(*rest, *self._static_head(widths[-1])))

    def _configurations(self) -> Configurations:
        """Return the configurations that the gate picks from; without a gate, the smallest and largest."""
        if not self.gated:
            return tuple(dict.fromkeys([tuple(widths[0] for widths in self.lists), self.largest]))
        fixed, free = self.lists[: self.gated[0] + 1], self.lists[self.gated[0] + 1 :]
        counts = [len(widths) for widths in free]
        if len(set(counts)) > 1:
            raise ModelError(
                f"the stages from the gated one on have {counts} widths; expected equally many, because one "
                "choice goes for all. Fix choices_cfg."
            )
        start = tuple(widths[0] for widths in fixed)
        return tuple((*start, *vector) for vector in zip(*free, strict=True))

    def _check_gated(self) -> int:
        """Return the index of the gated stage."""
        if len(self.gated) != 1:
            raise ModelError(
                f"this DSNet has {len(self.gated)} gated stages; expected 1: the gate of a routed program "
                "picks a whole configuration. Deploy static(choice), or build it with one gated stage."
            )
        outputs = self.stages[self.gated[0]].first_block.gate.outputs
        check_outputs(outputs, len(self.configurations), "DSNet")
        return self.gated[0]

    def _gated_block(self) -> int:
        """Return the index of the gated block among all blocks."""
        return sum(len(stage.all_blocks) for stage in self.stages[: self._check_gated()])

    def _walk(self, widths: Sequence[int]) -> list[tuple[SlimmableBlock, int, int]]:
        """List every block with its channel numbers."""
        walk, width = [], widths[0]
        for stage, out_channels in zip(self.stages, widths[1:], strict=True):
            for block in stage.all_blocks:
                walk.append((block, width, out_channels))
                width = out_channels
        return walk

    def _static_stem(self, width: int) -> list[nn.Module]:
        conv = self.conv_stem.static(self.conv_stem.in_channels, width)
        return [conv, self.bn1.static(width), self.act1]

    def _static_head(self, width: int) -> list[nn.Module]:
        head: list[nn.Module] = []
        if self.conv_head is not None:
            channels = self.conv_head.out_channels
            head = [self.conv_head.static(width, channels), self.bn2.static(channels), self.act2]
            width = channels
        return [*head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.classifier.static(width)]


def _check_choices(choices_cfg: Sequence[Sequence[Any]]) -> None:
    lengths = [len(row) for row in choices_cfg]
    if len(lengths) < 3 or lengths[0] != 4 or set(lengths[1:-1]) != {6} or lengths[-1] > 1:
        raise ModelError(
            f"choices_cfg has rows of {lengths} entries; expected 4 (stem), 6 for each stage, at least one, "
            "and 0 or 1 (head). Fix choices_cfg."
        )
    if choices_cfg[0][1] != 1:
        raise ModelError(
            f"the stem of choices_cfg has {choices_cfg[0][1]} blocks; expected 1: the stem is one "
            "convolution. Fix choices_cfg."
        )


def recognise_dsnet(module: nn.Module) -> DSNet | None:
    """Make our network from an instance of the authors' DSNet; its gate picks, in whatever mode it was left.

    Returns:
        Our network with the same weights, or None for a class of that name without slimmable layers.

    Raises:
        ModelError: when its structure is not the authors'.
    """
    if not any(hasattr(part, "channel_choice") for part in module.modules()):
        return None
    try:
        network = DSNet(**_read_arguments(module))
        state = module.state_dict()
        network.to(state["conv_stem.weight"].device, state["conv_stem.weight"].dtype).load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, ModelError) as error:
        raise ModelError(
            f"a DSNet is not the authors' network: {str(error).splitlines()[0]}. Build it with "
            "edgedyn.checkpoints.authors.from_authors from its constructor arguments and state_dict."
        ) from error
    return network.train(module.training)


def _read_arguments(module: Any) -> dict[str, Any]:
    """Read the constructor arguments off an instance; raise ModelError where its blocks differ in one."""
    stages = list(module.blocks)
    firsts = [stage.first_block for stage in stages]
    blocks = [block for stage in stages for block in (stage.first_block, *stage.residual_blocks)]
    norms = [part.aux_bn[-1] for part in module.modules() if hasattr(part, "aux_bn")]
    acts = [type(part).__name__ for key, part in module.named_modules() if _is_block_activation(key)]
    choices: list[list[Any]] = [
        [
            list(module.conv_stem.out_channels_list),
            1,
            module.conv_stem.kernel_size[0],
            module.conv_stem.stride[0],
        ]
    ]
    for stage, first in zip(stages, firsts, strict=True):
        layout = [stage.layer_num, first.kernel_size, first.conv_dw.stride[0], stage.stage_type]
        choices.append([list(first.out_channels_list), *layout, first.has_gate])
    if any(block.conv_dw.dilation[0] != 1 for block in blocks):
        raise ModelError("a block is dilated, which choices_cfg cannot express")
    for gate in (block.gate for block in blocks):
        probe = torch.tensor([-1.0, 2.0])
        if not torch.allclose(gate.attn_act_fn(probe.clone()), torch.sigmoid(probe)):
            raise ModelError("the attention of a block is no sigmoid")
    return {
        "num_classes": module.classifier.out_features,
        "in_chans": module.conv_stem.in_channels,
        "choices_cfg": [*choices, [[module.conv_head.out_channels]] if module.has_head else []],
        "act_layer": _only("activations", acts).lower(),
        "noskip": not _only("shortcuts", [block.has_residual for block in blocks]),
        "se_ratio": _find_ratio(
            [(b.gate.conv_expand.out_channels, b.gate.conv_reduce.out_channels) for b in blocks]
        ),
        "norm_kwargs": {
            key: _only(f"norms ({key})", [getattr(norm, key) for norm in norms])
            for key in ("eps", "momentum", "affine")
        },
        "bias": module.conv_stem.bias is not None,
        "gate_outputs": max((b.gate.channel_gate_num for b in blocks if b.has_gate), default=4),
    }


def _is_block_activation(path: str) -> bool:
    """Tell whether a path is an activation of a block or of the network, not of an attention."""
    *before, last = path.split(".")
    return last in ("act1", "act2") and before[-1:] != ["gate"]


def _only(name: str, values: Sequence[Any]) -> Any:
    """Return the value that all share."""
    if len(set(values)) != 1:
        raise ModelError(f"its {name} differ: {sorted(map(str, set(values)))}")
    return values[0]


def _find_ratio(widths: Sequence[tuple[int, int]]) -> float:
    """Find the ``se_ratio`` that gives every attention its reduced width; an instance does not store it."""
    for ratio in (0.25, *(k / 240 for k in range(1, 241))):  # 240: every fraction in use is one of these
        if all(make_divisible(widest * ratio, 1) == reduced for widest, reduced in widths):
            return ratio
    raise ModelError(
        f"no se_ratio gives the reduced widths of its attentions, {list(widths)} (widest, reduced)"
    )
