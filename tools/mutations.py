"""Random damage to files: bytes, words of a text, values of a JSON tree. A seed repeats it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

_TOKENS = re.compile(rb"\s+|\w+|[^\w\s]")
_WORDS = [
    *(b"*a", b"&a ", b"<<: ", b"? ", b"- ", b"!!binary ", b"!!python/name:os.system ", b"!!set ", b"---\n"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b"\n", b"\t", b"\r", b": ", b", ", b"|\n", b"%YAML 9.9\n", b"\\"),
    *(b".inf", b"-.inf", b".nan", b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"9" * 400, b"0x" + b"f" * 99),
    *(b"null", b"true", b"~", b"2024-01-01", b"1:30:00", b'"\\u0000"', b'"\\ud800"', b'"\\U0010ffff"'),
    *(b"\x00", b"\x1b[31m", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\x85", b"[" * 3000, b'{"a":' * 3000),
    *(b"../../etc/passwd", b"/dev/zero", b"a" * 5000, b"float64", b"object", b"|O", b">f4"),
]
_NUMBERS = [0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 1e308, -0.0, 5e-324, "", "x", "../x", "\x1b[31m", "\x00"),
    *([], {}, [[]], [None], {"": None}, [1] * 2000, "y" * 2000, "float32", "float16", "vectors/0.input.npy"),
]


def mutate(data: bytes, others: Sequence[bytes], random: Random, *, is_text: bool) -> bytes:
    """Return data with one to four damages; text is mostly damaged by words."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        if is_text and random.random() < 0.7:
            data = _damage_words(data, random)
        else:
            data = random.choice(_DAMAGES)(data, others, random)
    return data


def mutate_json(values: Any, random: Random) -> Any:
    """Return a JSON tree in which one to three values, keys or items are other ones."""
    tree = json.loads(json.dumps(values))
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(random.choice(_VALUES))
        holder, key = random.choice(places)
        kind = random.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(random.choice(_VALUES))[:50]] = holder.pop(key)
        elif kind == 2:
            other, place = random.choice(places)
            holder[key] = json.loads(json.dumps(other[place])) if _has(other, place) else None
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice((-holder[key], holder[key] * 1000, holder[key] + 1, 0.5))
        else:
            holder[key] = copy.deepcopy(random.choice(_VALUES))  # a later step may change it
    return tree


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def _places(tree: Any) -> Any:
    """Yield every (holder, key) of a tree."""
    pending = [tree]
    while pending:
        holder = pending.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            yield holder, key
            pending.append(holder[key])


def _damage_words(data: bytes, random: Random) -> bytes:
    words = _TOKENS.findall(data) or [b""]
    at = random.randrange(len(words))
    kind = random.randrange(6)
    if kind == 0:
        words[at] = random.choice(_WORDS)
    elif kind == 1:
        words.insert(at, random.choice(_WORDS))
    elif kind == 2:
        del words[at : at + random.randint(1, 5)]
    elif kind == 3:
        words[at:at] = words[at : at + random.randint(1, 20)] * random.randint(1, 5)
    elif kind == 4:
        words[at] = words[random.randrange(len(words))]
    else:
        words[at] = str(random.choice((-1, 1)) * random.choice(_NUMBERS)).encode()
    return b"".join(words)


def _flip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return data[: _place(data, random)]


def _insert(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at = _place(data, random)
    filling = random.choice((random.randbytes(random.randint(1, 40)), bytes(random.randint(1, 4000))))
    return data[:at] + filling + data[at:]


def _remove(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 4, 64, 4096)) :]


def _splice(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(others)
    return data[: _place(data, random)] + other[_place(other, random) :]


def _number(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Write a number at a limit over 1 to 8 bytes, where formats keep sizes and offsets."""
    size, at = random.choice((1, 2, 4, 8)), _place(data, random)
    value = (random.choice(_NUMBERS) % 2 ** (8 * size)).to_bytes(size, random.choice(("little", "big")))
    return data[:at] + value + data[at + size :]


def _repeat(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at, size = _place(data, random), random.choice((1, 16, 256))
    return data[:at] + data[at : at + size] * random.randint(2, 50) + data[at + size :]


def _place(data: bytes, random: Random) -> int:
    """Return a place, half of them in the first 200 bytes, where headers are."""
    size = max(len(data), 1)
    return random.randrange(min(size, 200) if random.random() < 0.5 else size)


_DAMAGES = (_flip, _flip, _truncate, _insert, _remove, _splice, _number, _number, _repeat)
