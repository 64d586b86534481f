"""Mutations of bytes, of JSON and TOML trees, and of tensor headers."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import tomli_w

from tests.fuzz.values import ODD_TEXT

Tree = Any
DEEP = 5_000
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**53 + 1,
    2**63, -(2**63) - 1, 2**64, 10**400, "", " ", "x", "0", "1e9", [], {}, [[]], [None], [0],
    {"a": 1},
    {"": ""}, ["a", 1], [[1, 2], [3]], [-1], "nan", "\x00", "\x1b[31m", "\u009b", "\u202e",
    "a" * 5000,
    "../../etc/passwd", "/dev/zero", "/nonexistent", "\n", [1e308] * 3, 1.5, "null", [[0, "x"]],
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bytes flipped, cut, inserted, doubled or zeroed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _OPERATIONS[rng.randrange(len(_OPERATIONS))](out, rng)
    return bytes(out)


def _flip(out: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 16))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[rng.randrange(len(out) + 1) :]


def _drop(out: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(out) + 1)
    del out[at : at + rng.choice((1, 4, 100))]


def _insert(out: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(out) + 1)
    out[at:at] = rng.choice(
        (b"\x00", b"\xff" * 8, b"\xef\xbb\xbf", rng.randbytes(16), b"\n", b'"', b"[" * 50)
    )


def _double(out: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(out) + 1)
    out[at:at] = out[at : at + rng.choice((8, 64, 4096))]


def _zero(out: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(out) + 1), rng.choice((4, 64, 4096))
    out[at : at + length] = bytes(len(out[at : at + length]))


def _number(out: bytearray, rng: random.Random) -> None:
    """Replace four bytes, which may be a length, by another number."""
    if len(out) > 4:
        at = rng.randrange(len(out) - 4)
        value = rng.choice((0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(out)))
        out[at : at + 4] = struct.pack(rng.choice("<>") + "I", value)


def _empty(out: bytearray, rng: random.Random) -> None:
    if rng.random() < 0.1:
        out.clear()


_OPERATIONS = (_flip, _flip, _cut, _drop, _insert, _double, _zero, _number, _empty)


def bend(tree: Tree, rng: random.Random) -> Tree:
    """A tree with some values replaced, removed, renamed, doubled or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return rng.choice(ODD_VALUES)
        inside, key = rng.choice(places)
        pick = rng.random()
        if pick < 0.6:
            inside[key] = _value(inside[key], rng)
        elif pick < 0.8:
            del inside[key]
        elif isinstance(inside, dict):
            inside[rng.choice(ODD_TEXT[:60])] = rng.choice((inside[key], _value(0, rng)))
        else:
            inside.append(copy.deepcopy(inside[key]))
    return tree


def _value(old: Any, rng: random.Random) -> Any:
    """A replacement for a value, similar or very different."""
    if isinstance(old, bool) or rng.random() < 0.6:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    if isinstance(old, int | float):
        half = old + 0.5 if abs(old) < 1e308 else old  # larger integers overflow
        return rng.choice((-old, old * 2, old + 1, old - 1, old * 10**9, str(old), [old], half))
    if isinstance(old, str):
        return rng.choice((old.upper(), old + "\x1b[1m", old[:-1], [old], {old: old}, old * 100))
    return rng.choice(([old], {"a": old}, None, 7))


def _places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in inner:
        yield tree, key
        yield from _places(value)


def hostile_json(tree: Tree, rng: random.Random) -> bytes:
    """Hostile JSON text made from a tree."""
    pick = rng.random()
    if pick < 0.12:
        return rng.choice(_ODD_JSON)
    bent = bend(tree, rng) if pick < 0.85 else tree
    text = json.dumps(bent, ensure_ascii=rng.random() < 0.5)
    data = text.encode(errors="surrogatepass" if rng.random() < 0.5 else "replace")
    if pick > 0.8:
        data = damage(data, rng)
    if pick > 0.97:  # deep nesting in place of a value
        at = data.find(b": ") + 2
        data = data[:at] + b"[" * DEEP + b"]" * DEEP + b"," + data[at:]
    return data


_ODD_JSON = (
    b"", b"\x00", b"null", b"[]", b"{}", b"1", b'"x"', b"[" * DEEP, b"[" * 200_000, b'{"a":' * DEEP,
    b"[" * DEEP + b"]" * DEEP, b"NaN", b"9" * 10_000, b"-", b"1e999999", b'{"a":1,"a":2}',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}", b'"\\ud800"', b"{" + b'"schema": "wancli.run/1"}',
    b'{"schema": "wancli.run/1", "request": {}}', b'{"schema": "wancli.run/1", "request": null}',
    b'{"schema": "wancli.rollout/1"}', b"\n" * 10_000, b"{}" * 10,
)  # fmt: skip


def hostile_toml(tree: Tree, rng: random.Random) -> bytes:
    """Hostile TOML text made from a tree."""
    pick = rng.random()
    if pick < 0.15:
        return rng.choice(_ODD_TOML)
    text = b""
    for _ in range(9):  # until the tree can be written as TOML
        try:
            text = tomli_w.dumps(_without_nulls(bend(tree, rng) if pick < 0.8 else tree)).encode()
            break
        except (TypeError, ValueError, AttributeError):
            continue
    return damage(text, rng) if pick > 0.75 else text


def _without_nulls(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {str(key): _without_nulls(value) for key, value in tree.items() if value is not None}
    return (
        [_without_nulls(value) for value in tree if value is not None]
        if isinstance(tree, list)
        else tree
    )


_ODD_TOML = (
    b"", b"\x00", b"x", b"= 1", b"[", b"[[", b"a = " + b"[" * DEEP,
    b"a = " + b"[" * DEEP + b"]" * DEEP,
    b"a = " + b"{a = " * 500, b"a." * DEEP + b"b = 1", b"[" + b"a." * DEEP + b"a]", b"\xff\xfe",
    b'a = "\\ud800"',
    b"a = 1979-05-27T07:32:00Z", b"a = inf", b"a = nan", b"a = " + b"9" * 10_000, b"a = 1\na = 2",
    b'extends = "x"', b'extends = "\\u0000"', b'extends = "/dev/zero"', b'extends = "../x.toml"',
    b'extends = "x.toml"', b'extends = ["x"]', b"[sampling]\nsteps = 1e400",
    b"[[sampling]]\nsteps = 1",
    b'[sampling]\nnegative_prompt = "\\u001b[31m"', b'["\\u001b[31m"]\nx = 1', b'"\\u009bx" = 1',
    b'description = "\\u001b[31mred\\u001b[0m \\u009b \\u202e"', b"[tuned_for]\nmodel = [1]",
    b"[tuned_for]\n'\\x1b' = 1", b"[sampling]\nsteps = 1979-05-27", b"\r", b"a = '''",
    b"prompts = 1",
    b'prompts = [["a"]]\n[variants]\na = "--steps 1"', b'prompts = ["a"]\nseeds = []',
    b'prompts = ["a"]\n[variants]\na = ""', b'prompts = ["a"]\n[variants]\n"" = "--steps 1"',
    b'prompts = ["a\\u0000"]\n[variants]\na = "--steps \\u0000"', b"at = 1", b"[[at]]", b"at = [1]",
    b'[[at]]\nchunk = true\nprompt = "x"', b'[[at]]\nchunk = 99999999999999999999\nprompt = "x"',
)  # fmt: skip


def hostile_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a changed header or changed bytes."""
    pick = rng.random()
    if pick < 0.35:
        return damage(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if pick < 0.5:
        return rng.choice(_headers(rest))
    if pick < 0.75:
        _retype(header, rng)
        if rng.random() < 0.5:
            return _join(json.dumps(header).encode(), rest)
    return _join(hostile_json(header, rng), rest)


def _retype(header: dict[str, Any], rng: random.Random) -> None:
    """Give one tensor another type or shape, which may still match its size."""
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    shape = entry["shape"]
    pick = rng.randrange(6)
    if pick == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X")
        )
    elif pick == 1:
        rng.shuffle(shape)
    elif pick == 2:
        entry["shape"] = [1, *shape]
    elif pick == 3:
        entry["shape"] = rng.choice(([], [0], [0, 4, 4, 4], [-1], [2**62, 4], [1] * 99))
    elif pick == 4:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 4], [8, 4], [0, 2**63], [-4, 0]))
    else:
        name = rng.choice(names)
        header[rng.choice(("x", "", "\x1b[31m", "latents", "noise", "a.b.c"))] = header.pop(name)


_ONE = b'{"dtype": "F32", "shape": [1,4,4,4], "data_offsets": [0, 256]}'


def _headers(rest: bytes) -> list[bytes]:
    deep = b"[" * DEEP + b"]" * DEEP
    return [
        b"", b"\x00", bytes(8), bytes(7), b"\xff" * 8, struct.pack("<Q", 2**40) + rest,
        struct.pack("<Q", 100_000_001) + rest, _join(b"{}", b""), _join(b"[]", rest),
        _join(b"", rest),
        _join(deep, rest), _join(b'{"__metadata__": ' + deep + b"}", rest), _join(b"null",
        b""),
        _join(b'{"latents": {}}', rest), _join(b'{"latents": null}', rest),
        _join(b'{"latents": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
        _join(b'{"latents": {"dtype": "F32", "shape": [0,4,4,4], "data_offsets": [0, 0]}}', b""),
        _join(b'{"__metadata__": {"wancli": "{}"}, "latents": ' + _ONE + b"}", bytes(256)),
        _join(b'{"latents": ' + _ONE + b"}", b"\xff" * 256),
    ]  # fmt: skip


def _join(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest
