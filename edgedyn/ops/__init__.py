"""Primitive ops, one folder each: the few operations that the layers of all papers are rewritten to.

A folder adds an op by a constant ``OP`` in its ``__init__.py``, here or in an extension
(``edgedyn/extensions.py``); a file ``ops/<op>/<form>.py`` of an extension adds a form to an op by a constant
``FORM``. The eager body of an op is its definition (the oracle).

A *form* is one way for a runtime to compute an op: a plain function of the op's signature, made of ordinary
operators, or a kernel of ours. It names the capabilities that it needs, never a target.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from edgedyn.errors import NoFormError, RecipeError, nearest
from edgedyn.extensions import extend_path, load_named, module_names
from edgedyn.graph.constants import fold_constants

__path__ = extend_path(__path__, __name__)


class HasCapabilities(Protocol):
    """A target, as far as the choice of a form depends on it."""

    @property
    def name(self) -> str:
        """The name that a recipe gives it."""

    @property
    def capabilities(self) -> frozenset[str]:
        """The capabilities that it offers to forms."""


@dataclass(frozen=True)
class Form:
    """One way to compute an op.

    Attributes:
        name: the trick, for instance ``resize_shift_mac``.
        fn: function of the op's signature that replaces the op's node in the graph; None keeps the node, for
            a kernel of ours.
        requires: capabilities that a target must have.
        decompose: when ``fn`` replaces the node. ``before_quantize``: the quantizer annotates the operators
            of ``fn``. ``after_quantize``: the quantizer sees one float node, and the operators of ``fn``
            stay float.
    """

    name: str
    fn: Callable[..., torch.Tensor] | None
    requires: frozenset[str] = frozenset()
    decompose: Literal["before_quantize", "after_quantize"] = "before_quantize"


FUSED = Form("fused", None, requires=frozenset({"edgedyn_kernels"}), decompose="after_quantize")


@dataclass(frozen=True)
class Op:
    """A primitive op.

    Attributes:
        name: the folder's name, and the op's in ``torch.ops.edgedyn``.
        overload: the ``torch.library`` overload; its first argument is x (B, C, H, W).
        forms: its forms, best first; a target takes the first one whose required capabilities it has. The
            last one requires none.
        examples: yields argument tuples of the op that tell a wrong index from a right one: B >= 2, H != W.
        generated: names of the arguments that the network computes from its input: kernels, coefficients,
            masks.
        apply_macs: multiply-adds of one call from its arguments, of which only shapes are read.
        has_affine_int8: whether ``name_int8`` is the variant that ``register`` derives, with x and y in
            int8; False where it has a schema of its own.
    """

    name: str
    overload: torch._ops.OpOverload
    forms: tuple[Form, ...]
    examples: Callable[[], Iterable[tuple[Any, ...]]]
    generated: tuple[str, ...]
    apply_macs: Callable[..., int]
    has_affine_int8: bool = True


def register(
    name: str, schema: str, oracle: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> torch._ops.OpOverload:
    """Register ``edgedyn::name`` and its INT8 variant, each with the ``.out`` variant that ExecuTorch calls.

    ``name_int8`` takes x and returns y as int8, with the quantization parameters of both as arguments: its
    kernel reads and writes INT8 and holds no float feature map in between. All four come from one schema:
    ``custom_op`` infers SymInt for an argument typed int, and ExecuTorch then reports "Missing out variants"
    (executorch 1.5).

    Args:
        name: name of the op.
        schema: ``(Tensor x, ...) -> Tensor``.
        oracle: the definition.
        fake: returns an empty tensor of the output's shape; makes the same checks as the oracle.

    Returns:
        The overload ``torch.ops.edgedyn.<name>.default``.
    """
    first, rest = schema[1 : schema.rindex(")")].split(", ", 1)

    def oracle_int8(x: torch.Tensor, scale: float, zero_point: int, *rest: Any) -> torch.Tensor:
        *others, y_scale, y_zero_point = rest
        y = oracle((x.float() - zero_point) * scale, *others)
        # as quantize_per_tensor rounds
        return torch.clamp((y * (1 / y_scale)).round() + y_zero_point, -128, 127).to(torch.int8)

    def fake_int8(x: torch.Tensor, scale: float, zero_point: int, *rest: Any) -> torch.Tensor:
        return fake(x.to(torch.float32), *rest[:-2]).to(torch.int8)

    overload = define(name, f"{first}, {rest}", oracle, fake)
    affine = f"{first}, float x_scale, int x_zero_point, {rest}, float y_scale, int y_zero_point"
    define(f"{name}_int8", _without_defaults(affine), oracle_int8, fake_int8)
    return overload


def define(
    name: str, arguments: str, body: Callable[..., torch.Tensor], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Register ``edgedyn::name`` and its ``.out`` variant; ``register`` does so for both of its ops.

    Args:
        name: name of the op.
        arguments: of the schema, ``Tensor x, ...``.
        body: the definition.
        fake: returns an empty tensor of the output's shape; makes the same checks as ``body``.

    Returns:
        The overload ``torch.ops.edgedyn.<name>.default``.
    """

    def body_out(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        y = body(*args, **kwargs)
        return out.resize_(y.shape).copy_(y)

    torch.library.define(f"edgedyn::{name}", f"({arguments}) -> Tensor")
    torch.library.define(f"edgedyn::{name}.out", f"({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.impl(f"edgedyn::{name}", "CompositeExplicitAutograd", body)
    torch.library.impl(f"edgedyn::{name}.out", "CompositeExplicitAutograd", body_out)
    torch.library.register_fake(f"edgedyn::{name}", fake)
    return getattr(torch.ops.edgedyn, name).default  # type: ignore[no-any-return]


def _without_defaults(arguments: str) -> str:
    """Drop the defaults of a schema: required arguments may not follow those that have one."""
    return re.sub(r"=[^,]+", "", arguments)


def is_ours(node: torch.fx.Node) -> bool:
    """Tell whether a node of a program calls an op of ours, or its INT8 variant."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "edgedyn"


def load_all() -> dict[str, Op]:
    """Return every op by name; a form that an extension adds stands before the op's own."""
    names = module_names(__path__, are_folders=True)
    return {name: _add_forms(load_named(f"{__name__}.{name}", "OP", Op)) for name in names}


def _add_forms(op: Op) -> Op:
    package = importlib.import_module(f"{__name__}.{op.name}")
    home, *added = dict.fromkeys(extend_path(package.__path__, package.__name__))
    if not added:
        return op
    package.__path__ = [home, *added]
    names = sorted(set(module_names(package.__path__)) - set(module_names([home])))
    forms = [load_named(f"{package.__name__}.{name}", "FORM", Form) for name in names]
    return replace(op, forms=(*forms, *op.forms)) if forms else op


def choose_form(op: Op, target: HasCapabilities, requested: str | None = None) -> Form:
    """Return the named form, or else the first one whose capabilities the target has.

    Raises:
        RecipeError: when the op has no form of that name.
        NoFormError: when the target lacks a capability of the named form, or of every form; the message lists
            the needs of all forms.
    """
    if requested is not None and requested not in {form.name for form in op.forms}:
        known = [form.name for form in op.forms]
        raise RecipeError(
            f"form {requested!r} of op {op.name!r} is unknown; {nearest(requested, known)}found forms: "
            f"{', '.join(known)}. Fix forms.{op.name}."
        )
    candidates = [form for form in op.forms if requested in (None, form.name)]
    for form in candidates:
        if form.requires <= target.capabilities:
            return form
    others = "; ".join(f"{form.name} needs {sorted(form.requires)}" for form in op.forms)
    raise NoFormError(
        f"target {target.name!r} cannot run op {op.name!r} as {requested or 'any form'}: it has "
        f"{sorted(target.capabilities)}, but {others}. Pick another form in the recipe "
        f"(forms.{op.name}), or add one: docs/extending.md."
    )


def choose_forms(
    program: torch.export.ExportedProgram, target: HasCapabilities, requested: Mapping[str, str]
) -> dict[Op, Form]:
    """Choose a form for every op of ours that the program calls.

    Args:
        program: exported program with our ops as single nodes.
        target: the target that shall run it.
        requested: op name -> form name, the recipe's ``forms``.

    Raises:
        RecipeError: when ``requested`` names an op that does not exist, or a form that the op does not have.
        NoFormError: when no form of an op, or not the requested one, runs on the target.
    """
    known = load_all()
    unknown = sorted(set(requested) - set(known))
    if unknown:
        raise RecipeError(
            f"forms names the unknown op {unknown[0]!r}; {nearest(unknown[0], known)}found ops: "
            f"{', '.join(known)}. Fix the recipe."
        )
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {
        op: choose_form(op, target, requested.get(op.name)) for op in known.values() if op.overload in called
    }


def decompose(
    program: torch.export.ExportedProgram, forms: Mapping[Op, Form], when: str
) -> torch.export.ExportedProgram:
    """Replace the nodes of ops by the operators of their forms.

    Operators whose inputs are all constants are computed here, once.

    Args:
        program: exported program with our ops as single nodes.
        forms: the form of each op that the program calls.
        when: ``before_quantize`` or ``after_quantize``; forms with another ``decompose`` keep their nodes.
    """
    table = {op.overload: form.fn for op, form in forms.items() if form.decompose == when and form.fn}
    return fold_constants(program.run_decompositions(table)) if table else program
