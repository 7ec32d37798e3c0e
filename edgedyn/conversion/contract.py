"""The inputs and outputs of a network against those of its recipe, checked before an image is read.

{"out": a, "aux": [b, c], "state": None}     outputs out, aux.0, aux.1; state holds no tensor
(small, fine), outputs: [1]                  the program returns fine
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgedyn.bundle.tensors import GUIDE, PICTURE, encode_inputs
from edgedyn.errors import EdgedynError, ModelError, RecipeError, nearest, quote

if TYPE_CHECKING:
    from edgedyn.bundle.tensors import TensorSpec
    from edgedyn.recipe.recipe import Recipe

_SIGMA = 25.0  # of the noise that an input of the example states; any level shows shapes


@dataclass(frozen=True)
class Loaded:
    """A recipe's network whose inputs and outputs fit the recipe.

    Attributes:
        recipe: with the scale of the network, where the recipe leaves it open.
        model: in evaluation mode; it returns one tensor, or a tuple of the chosen ones.
        outputs: these tensors, in order.
    """

    recipe: Recipe
    model: nn.Module
    outputs: tuple[TensorSpec, ...]


def load_network(recipe: Recipe, *, trust: bool = False) -> Loaded:
    """Load the recipe's network, run it once on a ramp of grey, and choose its outputs.

    Raises:
        ModelError: when it takes another number of inputs, or cannot run on the recipe's shapes; when it
            returns several tensors of which the recipe chooses none, or outputs that do not fit the task or
            are not finite.
        RecipeError: for a name in ``outputs`` that the network does not return.
        EdgedynError: as ``Recipe.load_model``.
    """
    model, specs = recipe.load_model(trust=trust), recipe.input_specs()
    refuse_other_inputs(model, [spec.name for spec in specs])
    leaves = dict(flatten(_run(model, example_inputs(specs))))
    fitting = [n for n, y in leaves.items() if isinstance(y, Tensor) and _fit(recipe, tuple(y.shape))[1]]
    chosen = choose_outputs(leaves, recipe.outputs, type(model).__name__, fitting)
    if list(leaves) != [""]:  # a hook, so that the names of the layers stay

        def select(module: nn.Module, inputs: Any, output: Any) -> Any:
            tensors = dict(flatten(output))
            picked = tuple(tensors[name] for name in chosen)
            return picked if len(picked) > 1 else picked[0]

        model.register_forward_hook(select)
    _refuse_broken(leaves, chosen)
    recipe = _with_scale(recipe, leaves, chosen[0])
    names = [name if name and not name[0].isdigit() else f"output{name}" for name in chosen]
    names = names if len(names) > 1 or not chosen[0].isdigit() else ["output"]
    outputs = [recipe.output_spec(n, leaves[c].shape) for n, c in zip(names, chosen, strict=True)]
    return Loaded(recipe, model, tuple(outputs))


def refuse_other_inputs(model: nn.Module, names: Sequence[str], source: str = "the recipe") -> None:
    """Refuse a network that takes another number of inputs.

    Raises:
        ModelError: with the names of its inputs and of those that the source gives.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    unnamed = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if keywords := [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]:
        raise ModelError(
            f"{type(model).__name__} takes the input {keywords[0]!r} by keyword only; expected inputs by "
            "position. Move it in front of the * in forward."
        )
    if len(required) <= len(names) and (unnamed or len(names) <= len(positional)):
        return
    expected = required if len(names) < len(required) else [p.name for p in positional]
    fix = (
        "give the others in inputs: of a recipe, each with a name, a shape, and a value or a noise_level."
        if len(names) < len(expected)
        else "remove those that it does not take."
    )
    raise ModelError(
        f"{type(model).__name__} takes {_count(expected, 'input')}, {source} gives {len(names)} "
        f"({', '.join(names)}); {fix}"
    )


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) of a network's output: of dictionaries, tuples, lists, dataclasses in any depth."""
    items = _items(value)
    if items is None:
        yield name, value
        return
    for key, inner in items:
        yield from flatten(inner, f"{name}.{key}" if name else key)


def _items(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", map(str, range(len(value))))
        return list(zip(names, value, strict=True))
    return None


def choose_outputs(
    leaves: Mapping[str, Any], keys: Sequence[str | int], network: str, fitting: Sequence[str] = ()
) -> list[str]:
    """Return the names of the outputs that a recipe chooses; without a choice, of the only tensor.

    Args:
        leaves: the outputs by name.
        keys: the recipe's ``outputs``.
        network: its name, for a refusal.
        fitting: names of the outputs that fit the task; a refusal suggests the first of them.

    Raises:
        ModelError: for several tensors and no choice, or for no tensor.
        RecipeError: for a key that names none of them, or no floating-point tensor.
    """
    returned = ", ".join(f"{name or 'output'} {_shape(leaf)}" for name, leaf in leaves.items())
    tensors = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
    if not tensors:
        raise ModelError(f"{network} returns {returned or 'nothing'}; expected a tensor. Return one.")
    if len(tensors) > 1 and not keys:
        likely = [*fitting, *tensors][0]
        raise ModelError(
            f"{network} returns {returned}; expected one tensor, or a choice. Set outputs: in the recipe to "
            f"those that the program shall have, the picture first, for instance outputs: [{likely}]."
        )
    chosen = [_find(leaves, key) for key in keys or tensors]
    for key, name in zip(keys or tensors, chosen, strict=True):
        leaf = leaves.get(name, "no output")
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float32:
            hint = nearest(name, tensors) if name not in leaves else ""
            raise RecipeError(
                f"outputs: {key!r} is {_shape(leaf)}; {hint}expected float32 tensors of {network}, which "
                f"returns {returned}."
            )
    return chosen


def _find(leaves: Mapping[str, Any], key: str | int) -> str:
    """Return the name of an output; a number that is no name counts the outermost level."""
    outermost = list(dict.fromkeys(name.partition(".")[0] for name in leaves))
    if isinstance(key, int) and str(key) not in leaves and 0 <= key < len(outermost):
        return outermost[key]
    return str(key)


def example_inputs(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Return inputs for a network: ramps of grey, constants and noise levels."""
    pictures = []
    for spec in specs:
        if spec.role in (PICTURE, GUIDE):
            ramp = np.linspace(0.25, 0.75, math.prod(spec.shape[2:]), dtype=np.float32)
            pictures.append(np.broadcast_to(ramp.reshape(spec.shape[2:]), spec.shape).copy())
    arrays = encode_inputs(tuple(specs), tuple(pictures), _SIGMA)
    return tuple(torch.from_numpy(array) for array in arrays)


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        with torch.no_grad():
            return model(*inputs)
    except EdgedynError:
        raise
    except (Exception, SystemExit) as error:  # the network's own, of any kind
        raise ModelError(
            f"{type(model).__name__} cannot run on inputs {[tuple(x.shape) for x in inputs]}: "
            f"{quote(error)}. Does the input shape fit (input.shape, inputs, model.arguments)?"
        ) from error


def _refuse_broken(leaves: Mapping[str, Tensor], chosen: Sequence[str]) -> None:
    for name in chosen:
        if broken := int((~leaves[name].isfinite()).sum()):
            raise ModelError(
                f"the output {name or 'of the network'} holds {broken} values that are NaN or infinite for "
                "a ramp of grey; expected finite ones. Check model.weights and the input's range, mean, std."
            )


def _with_scale(recipe: Recipe, leaves: Mapping[str, Any], first: str) -> Recipe:
    """Return the recipe with its network's scale, if the first output fits the task.

    Raises:
        ModelError: if it does not.
        RecipeError: for a guide of another size than the output.
    """
    shape = tuple(leaves[first].shape)
    expected, fits = _fit(recipe, shape)
    if not fits:
        others = [f"{n} {tuple(t.shape)}" for n, t in leaves.items() if isinstance(t, Tensor) and n != first]
        listed = f" It also returns {', '.join(others)}: choose one in outputs:." if others else ""
        raise ModelError(
            f"the output {first or 'of the network'} is {shape} for an input of "
            f"{tuple(recipe.input.shape)}; expected {expected} for the task {recipe.task}. Fix task or "
            f"input.shape.{listed}"
        )
    if recipe.guide is not None and recipe.guide.shape[2:] != list(shape[2:]):
        raise RecipeError(
            f"guide.shape is {recipe.guide.shape}; expected the output's size, {list(shape[2:])}. Fix it."
        )
    if recipe.task != "upscale":
        return recipe
    return recipe.model_copy(update={"scale": shape[2] // recipe.input.shape[2]})


def _fit(recipe: Recipe, shape: tuple[int, ...]) -> tuple[str, bool]:
    """Return the shape that a task expects of the first output, in words, and whether this one is it."""
    _, channels, height, width = recipe.input.shape
    if recipe.task == "classify":
        return "logits (1, K)", len(shape) == 2 and shape[0] == 1
    if recipe.task == "keypoints":
        return "heatmaps (1, K, h, w)", len(shape) == 4 and shape[0] == 1
    if recipe.task == "denoise":
        return f"(1, {channels}, {height}, {width})", shape == (1, channels, height, width)
    scale = recipe.scale or (shape[2] // height if len(shape) == 4 else 0)
    sides = f"s * {height}, s * {width}), s = {recipe.scale or '2, 3, 4 or more'}"
    return f"(1, {channels}, {sides}", scale > 1 and shape == (1, channels, height * scale, width * scale)


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} ({', '.join(names)})"


def _shape(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return str(leaf)[:40] if leaf is None or isinstance(leaf, int | float | str) else type(leaf).__name__
    kind = "" if leaf.dtype == torch.float32 else f" {str(leaf.dtype).removeprefix('torch.')}"
    return f"{tuple(leaf.shape)}{kind}"
