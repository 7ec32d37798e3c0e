"""From the contents of a checkpoint to the weights of one network.

    {"epoch": 3, "params": {"module.a.weight": ...}, "params_ema": {"module.a.weight": ...}}
        -> params_ema, "module." removed -> {"a.weight": ...}

Trainers nest weights under many names and put wrappers' prefixes in front of keys. No list of names decides:
every dictionary of tensors in the file, with every prefix removed, is compared with the network, and the one
that fits best is taken. Where several fit, averaged weights (EMA) come first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgedyn.errors import shown

_DEPTH = 4  # of dictionaries in dictionaries
_PREFIXES = 100  # of one dictionary: trainers write a few, and each is compared with the network
_AVERAGED = {"ema", "averaged", "average", "avg", "polyak", "swa", "shadow"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # modelEMA: model, EMA
# modules that torch puts around a network or around its parts
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# weights of torch's parametrizations, and of the hooks before them: the same values under other names
_SPELLINGS = (
    ("weight_g", "parametrizations.weight.original0"),
    ("weight_v", "parametrizations.weight.original1"),
    ("weight_orig", "parametrizations.weight.original"),
    ("weight_u", "parametrizations.weight.0._u"),
    ("weight_v", "parametrizations.weight.0._v"),
)


@dataclass(frozen=True)
class Candidate:
    """One set of weights of a checkpoint.

    Attributes:
        place: keys of the dictionaries around it.
        prefix: removed from its keys.
        state: key -> tensor.
        beside: number of tensors of the same dictionary that have another prefix.
        wrappers: names removed from the middle of its keys.
    """

    place: tuple[str, ...]
    prefix: str
    state: Mapping[str, Tensor]
    beside: int = 0
    wrappers: tuple[str, ...] = ()

    @property
    def is_averaged(self) -> bool:
        """Whether its names say that it is an average over training steps."""
        words = _WORD.findall(".".join((*self.place, self.prefix)))
        return bool(_AVERAGED & {word.lower() for word in words})

    @property
    def rank(self) -> tuple[bool, bool]:
        """Place among the sets that fit: averaged ones first, then those that stand alone."""
        return not self.is_averaged, self.beside > 0

    @property
    def tensors(self) -> set[int]:
        """Identities of its tensors."""
        return set(map(id, self.state.values()))

    def describe(self, others: list[Candidate]) -> list[str]:
        """Return notes on the choice; ``others`` fit the network too."""
        notes = []
        if self.place:
            notes.append(f"taken from {shown('.'.join(self.place))}")
        if self.prefix:
            notes.append(f"prefix {shown(self.prefix)} removed")
        if self.wrappers:
            notes.append(f"{' and '.join(self.wrappers)} removed from keys")
        if self.beside:
            notes.append(f"{self.beside} tensors beside it ignored")
        if self.is_averaged and any(not other.is_averaged for other in others):
            notes.append("averaged weights (EMA), which stand beside plain ones")
        alike = [c for c in others if c.rank == self.rank and c.tensors != self.tensors]
        if alike:
            notes.append(f"{shown('.'.join((*alike[0].place, alike[0].prefix)).strip('.'))} fits as well")
        return notes


def choose_state(
    own: Mapping[str, Tensor], contents: Any
) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Return the weights that fit a network best, and notes on the choice; None where there are no weights.

    Args:
        own: the network's state_dict.
        contents: of a checkpoint.
    """
    dictionaries = _tensors(contents, (), set())
    candidates = [c for place, tensors in dictionaries for c in _prefixes(place, tensors, own)]
    if not candidates:
        return None
    faults = [_faults(own, candidate.state) for candidate in candidates]
    fitting = [c for c, number in zip(candidates, faults, strict=True) if number == min(faults)]
    chosen = min(fitting, key=lambda c: (c.rank, len(c.wrappers)))
    state, notes = _respelled(own, chosen.state), chosen.describe(fitting)
    if state.keys() != chosen.state.keys():
        notes.append("weight_norm or spectral_norm spelled as in the network")
    kinds = {key: tensor.dtype for key, tensor in state.items() if tensor.is_floating_point()}
    converted = {
        str(kind).removeprefix("torch.") for key, kind in kinds.items() if _is_converted(own, key, kind)
    }
    if converted:
        notes.append(f"{' and '.join(sorted(converted))} converted to float32")
    return state, tuple(notes)


def _is_converted(own: Mapping[str, Tensor], key: str, kind: torch.dtype) -> bool:
    return key in own and own[key].dtype == torch.float32 and kind != torch.float32


def _tensors(
    value: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every dictionary of tensors once, with its place, the outer ones first."""
    if not isinstance(value, Mapping) or len(place) > _DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    named = {key: item for key, item in value.items() if isinstance(key, str)}
    if tensors := {key: item for key, item in named.items() if isinstance(item, Tensor)}:
        yield place, tensors
    for key, item in named.items():
        yield from _tensors(item, (*place, key), seen)


def _prefixes(
    place: tuple[str, ...], tensors: dict[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[Candidate]:
    """Yield all tensors, and those under each frequent prefix behind which a key of the network stands.

    Then the same without the names of wrappers, which also stand in the middle of keys.
    """
    yield from _with_prefixes(place, tensors, own, ())
    bare = {".".join(p for p in key.split(".") if p not in _WRAPPERS): t for key, t in tensors.items()}
    found = {part for key in tensors for part in key.split(".")} & _WRAPPERS
    if found and len(bare) == len(tensors):
        yield from _with_prefixes(place, bare, own, tuple(sorted(found)))


def _with_prefixes(
    place: tuple[str, ...],
    tensors: dict[str, Tensor],
    own: Mapping[str, Tensor],
    wrappers: tuple[str, ...],
) -> Iterator[Candidate]:
    yield Candidate(place, "", tensors, wrappers=wrappers)
    known = own.keys() | {new for key in own for new in _spellings(key)}
    longest = max(map(len, known), default=0)
    found = Counter(
        key[:at]
        for key in tensors
        for at in range(max(1, len(key) - longest), len(key))
        if key[at - 1] == "." and key[at:] in known
    )
    for prefix in sorted((prefix for prefix, _ in found.most_common(_PREFIXES)), key=len):
        part = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        yield Candidate(place, prefix, part, len(tensors) - len(part), wrappers)


def _faults(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int:
    state = _respelled(own, state)
    wrong = sum(own[key].shape != state[key].shape for key in own.keys() & state.keys())
    missing = sum(not key.endswith("num_batches_tracked") for key in own.keys() - state.keys())
    return wrong + missing + len(state.keys() - own.keys())


def _respelled(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the network's spelling of weight_norm and spectral_norm."""
    renamed = {}
    for key, tensor in state.items():
        fits = (new for new in _spellings(key) if new in own and key not in own)
        renamed[next(fits, key)] = tensor
    return renamed


def _spellings(key: str) -> list[str]:
    pairs = [pair for old, new in _SPELLINGS for pair in ((old, new), (new, old))]
    return [key[: -len(old)] + new for old, new in pairs if key == old or key.endswith(f".{old}")]
