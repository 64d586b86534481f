"""Damage: of bytes, of trees as JSON and TOML hold them, of tensors' headers."""

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


def damage(data: bytes, chance: random.Random) -> bytes:
    """A few changes of bytes: flipped, cut, put in, doubled, zeroed, moved."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        _OPERATIONS[chance.randrange(len(_OPERATIONS))](out, chance)
    return bytes(out)


def _flip(out: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 16))):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)


def _cut(out: bytearray, chance: random.Random) -> None:
    del out[chance.randrange(len(out) + 1) :]


def _drop(out: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(out) + 1)
    del out[at : at + chance.choice((1, 4, 100))]


def _insert(out: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(out) + 1)
    out[at:at] = chance.choice(
        (b"\x00", b"\xff" * 8, b"\xef\xbb\xbf", chance.randbytes(16), b"\n", b'"', b"[" * 50)
    )


def _double(out: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(out) + 1)
    out[at:at] = out[at : at + chance.choice((8, 64, 4096))]


def _zero(out: bytearray, chance: random.Random) -> None:
    at, length = chance.randrange(len(out) + 1), chance.choice((4, 64, 4096))
    out[at : at + length] = bytes(len(out[at : at + length]))


def _number(out: bytearray, chance: random.Random) -> None:
    """Four bytes that are a length, most likely, are another."""
    if len(out) > 4:
        at = chance.randrange(len(out) - 4)
        value = chance.choice((0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(out)))
        out[at : at + 4] = struct.pack(chance.choice("<>") + "I", value)


def _empty(out: bytearray, chance: random.Random) -> None:
    if chance.random() < 0.1:
        out.clear()


_OPERATIONS = (_flip, _flip, _cut, _drop, _insert, _double, _zero, _number, _empty)


def bend(tree: Tree, chance: random.Random) -> Tree:
    """A tree with some of its values exchanged, lost, renamed, doubled or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return chance.choice(ODD_VALUES)
        inside, key = chance.choice(places)
        pick = chance.random()
        if pick < 0.6:
            inside[key] = _value(inside[key], chance)
        elif pick < 0.8:
            del inside[key]
        elif isinstance(inside, dict):
            inside[chance.choice(ODD_TEXT[:60])] = chance.choice((inside[key], _value(0, chance)))
        else:
            inside.append(copy.deepcopy(inside[key]))
    return tree


def _value(old: Any, chance: random.Random) -> Any:
    """Something else, near what was there or far from it."""
    if isinstance(old, bool) or chance.random() < 0.6:
        return copy.deepcopy(chance.choice(ODD_VALUES))
    if isinstance(old, int | float):
        return chance.choice(
            (-old, old * 2, old + 1, old - 1, old * 10**9, str(old), [old], old + 0.5)
        )
    if isinstance(old, str):
        return chance.choice((old.upper(), old + "\x1b[1m", old[:-1], [old], {old: old}, old * 100))
    return chance.choice(([old], {"a": old}, None, 7))


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


def hostile_json(tree: Tree, chance: random.Random) -> bytes:
    """A tree as text that a JSON reader should not be given."""
    pick = chance.random()
    if pick < 0.12:
        return chance.choice(_ODD_JSON)
    bent = bend(tree, chance) if pick < 0.85 else tree
    text = json.dumps(bent, ensure_ascii=chance.random() < 0.5)
    data = text.encode(errors="surrogatepass" if chance.random() < 0.5 else "replace")
    if pick > 0.8:
        data = damage(data, chance)
    if pick > 0.97:  # deep in the place of a value
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


def hostile_toml(tree: Tree, chance: random.Random) -> bytes:
    """A tree as text that a TOML reader should not be given."""
    pick = chance.random()
    if pick < 0.15:
        return chance.choice(_ODD_TOML)
    text = b""
    for _ in range(9):  # until one can be said in TOML
        try:
            text = tomli_w.dumps(_sayable(bend(tree, chance) if pick < 0.8 else tree)).encode()
            break
        except (TypeError, ValueError, AttributeError):
            continue
    return damage(text, chance) if pick > 0.75 else text


def _sayable(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {str(key): _sayable(value) for key, value in tree.items() if value is not None}
    return (
        [_sayable(value) for value in tree if value is not None] if isinstance(tree, list) else tree
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


def hostile_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, or with other bytes."""
    pick = chance.random()
    if pick < 0.35:
        return damage(data, chance)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if pick < 0.5:
        return chance.choice(_headers(rest))
    if pick < 0.75:
        _retype(header, chance)
        if chance.random() < 0.5:
            return _joined(json.dumps(header).encode(), rest)
    return _joined(hostile_json(header, chance), rest)


def _retype(header: dict[str, Any], chance: random.Random) -> None:
    """One tensor is of another type, or another shape, and may still fill its bytes."""
    names = [name for name in header if name != "__metadata__"]
    told = header[chance.choice(names)]
    shape = told["shape"]
    pick = chance.randrange(6)
    if pick == 0:
        told["dtype"] = chance.choice(
            ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X")
        )
    elif pick == 1:
        chance.shuffle(shape)
    elif pick == 2:
        told["shape"] = [1, *shape]
    elif pick == 3:
        told["shape"] = chance.choice(([], [0], [0, 4, 4, 4], [-1], [2**62, 4], [1] * 99))
    elif pick == 4:
        told["data_offsets"] = chance.choice(([0, 0], [0, 4], [8, 4], [0, 2**63], [-4, 0]))
    else:
        name = chance.choice(names)
        header[chance.choice(("x", "", "\x1b[31m", "latents", "noise", "a.b.c"))] = header.pop(name)


_ONE = b'{"dtype": "F32", "shape": [1,4,4,4], "data_offsets": [0, 256]}'


def _headers(rest: bytes) -> list[bytes]:
    deep = b"[" * DEEP + b"]" * DEEP
    return [
        b"", b"\x00", bytes(8), bytes(7), b"\xff" * 8, struct.pack("<Q", 2**40) + rest,
        struct.pack("<Q", 100_000_001) + rest, _joined(b"{}", b""), _joined(b"[]", rest),
        _joined(b"", rest),
        _joined(deep, rest), _joined(b'{"__metadata__": ' + deep + b"}", rest), _joined(b"null",
        b""),
        _joined(b'{"latents": {}}', rest), _joined(b'{"latents": null}', rest),
        _joined(b'{"latents": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
        _joined(b'{"latents": {"dtype": "F32", "shape": [0,4,4,4], "data_offsets": [0, 0]}}', b""),
        _joined(b'{"__metadata__": {"wancli": "{}"}, "latents": ' + _ONE + b"}", bytes(256)),
        _joined(b'{"latents": ' + _ONE + b"}", b"\xff" * 256),
    ]  # fmt: skip


def _joined(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest
