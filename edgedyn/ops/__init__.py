"""Primitive ops, one folder each: what a paper layer is rewritten to, and how a target can compute it.

A folder adds an op by a constant ``OP`` in its ``__init__.py``. The eager body of an op is its definition
(the oracle); a form is a plain function of the same signature, and names the capabilities that it needs,
never a target.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from edgedyn.errors import NoFormError, RecipeError
from edgedyn.ops.constants import fold_constants

if TYPE_CHECKING:
    from edgedyn.targets import Target


@dataclass(frozen=True)
class Form:
    """One way to compute an op.

    Attributes:
        name: the trick, for instance ``resize_shift_mac``.
        fn: function with the op's signature.
        requires: capabilities that a target must state.
        expand: when the form replaces the op: quantizers see its nodes, or see one opaque float node.
    """

    name: str
    fn: Callable[..., torch.Tensor]
    requires: frozenset[str] = frozenset()
    expand: Literal["before_quantize", "after_quantize"] = "before_quantize"


@dataclass(frozen=True)
class Op:
    """A primitive.

    Attributes:
        name: the folder's name, and the op's in ``torch.ops.edgedyn``.
        overload: the ``torch.library`` overload; its first argument is x (B, C, H, W).
        forms: how targets can compute it, best first.
        examples: the op's arguments in order, inputs that discriminate.
        generated: names of the arguments that a generator computes from the input: kernels, coefficients,
            masks.
        apply_macs: multiply-adds of one call, from its arguments; tensors need only their shapes.
    """

    name: str
    overload: torch._ops.OpOverload
    forms: tuple[Form, ...]
    examples: Callable[[], Iterable[tuple[Any, ...]]]
    generated: tuple[str, ...]
    apply_macs: Callable[..., int]


def register(
    name: str, schema: str, oracle: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> torch._ops.OpOverload:
    """Register ``edgedyn::name`` and its ``.out`` twin, which ExecuTorch calls.

    Both come from one schema: ``custom_op`` infers SymInt where one types int, and ExecuTorch then reports
    "Missing out variants" (executorch 1.5).
    """

    def oracle_out(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        y = oracle(*args, **kwargs)
        return out.resize_(y.shape).copy_(y)

    arguments = schema[1 : schema.rindex(")")]
    torch.library.define(f"edgedyn::{name}", f"({arguments}) -> Tensor")
    torch.library.define(f"edgedyn::{name}.out", f"({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.impl(f"edgedyn::{name}", "CompositeExplicitAutograd", oracle)
    torch.library.impl(f"edgedyn::{name}.out", "CompositeExplicitAutograd", oracle_out)
    torch.library.register_fake(f"edgedyn::{name}", fake)
    return getattr(torch.ops.edgedyn, name).default  # type: ignore[no-any-return]


def load_all() -> dict[str, Op]:
    """Return every op by name."""
    folders = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)
    found = [importlib.import_module(f"edgedyn.ops.{folder}").OP for folder in folders]
    return {op.name: op for op in found}


def choose_form(op: Op, target: Target, wanted: str | None = None) -> Form:
    """Return the first form whose needs the target meets, or the wanted one.

    Raises:
        RecipeError: when the wanted form does not exist.
        NoFormError: when the target lacks what the form needs; every form is named with what it lacks.
    """
    if wanted is not None and wanted not in {form.name for form in op.forms}:
        known = ", ".join(form.name for form in op.forms)
        raise RecipeError(
            f"form {wanted!r} of op {op.name!r} is unknown; found forms: {known}. Mend forms.{op.name}."
        )
    candidates = [form for form in op.forms if wanted in (None, form.name)]
    for form in candidates:
        if form.requires <= target.capabilities:
            return form
    others = "; ".join(f"{form.name} needs {sorted(form.requires)}" for form in op.forms)
    raise NoFormError(
        f"target {target.name!r} cannot run op {op.name!r} as {wanted or 'any form'}: it has "
        f"{sorted(target.capabilities)}, but {others}. Pick another form in the recipe "
        f"(forms.{op.name}) or add one to edgedyn/ops/{op.name}/."
    )


def choose_forms(
    program: torch.export.ExportedProgram, target: Target, wanted: Mapping[str, str]
) -> dict[Op, Form]:
    """Choose a form for every op of ours that the program calls.

    Raises:
        RecipeError: when ``wanted`` names an op that does not exist, or a form that the op does not have.
        NoFormError: when no form of an op runs on the target.
    """
    known = load_all()
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise RecipeError(
            f"forms names the unknown op {unknown[0]!r}; found ops: {', '.join(known)}. Mend the recipe."
        )
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {
        op: choose_form(op, target, wanted.get(op.name)) for op in known.values() if op.overload in called
    }


def expand(
    program: torch.export.ExportedProgram, forms: Mapping[Op, Form], when: str
) -> torch.export.ExportedProgram:
    """Replace the ops whose forms are expanded at this point (``before_quantize`` or ``after_quantize``).

    What the forms compute from constants alone is computed here, once.
    """
    table = {op.overload: form.fn for op, form in forms.items() if form.expand == when}
    return fold_constants(program.run_decompositions(table)) if table else program
