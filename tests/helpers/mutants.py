"""Random safetensors files and JSON files from a seed: valid, nearly valid, and damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from shards import shard_bytes

SPACES = ("", " ", "\t", "\n", "\r\n", "  \n ", " " * 64)


class Text(str):
    """Text that is written as it is: JSON, or nearly JSON."""


class Pairs(list):
    """A JSON object as [key, value] pairs: a key can occur twice, and be spelled with escapes."""


# Values to put in place of others.
ODD = (
    *map(Text, ("-1", "-0", "0.0", "4.0", "4e0", "1e999", "-1e999", "04", "+4", "0x4", "4,", "٤")),
    *map(Text, ("NaN", "Infinity", "-Infinity", "null", "True", "'a'", "9" * 5000, "1" * 20)),
    *map(Text, ('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\t"', '"\\x"')),
    *map(Text, ("[]", "[4]", "[[4]]", "[null]", "{}", '{"U8":null}', '{"a":{"b":["c"]}}')),
    *map(Text, ("[" * 100 + "]" * 100, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000)),
    *(0, 1, 2, 3, 7, 8, 31, 2**31, 2**32, 2**48, 2**53, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)),
    *(True, False, None, "", "4", "a", "ü" * 300, 0.5),
)


def spelled(name: str, rng: random.Random) -> Text:
    """Return a name as JSON, sometimes with one letter escaped."""
    text = json.dumps(name, ensure_ascii=rng.random() < 0.5)
    if name and rng.random() < 0.5 and name.isalnum():
        at = rng.randrange(len(name))
        text = f'"{name[:at]}\\u{ord(name[at]):04X}{name[at + 1 :]}"'
    return Text(text)


def json_text(value, between: str = "") -> str:
    """Return the JSON text of a value, with white space between its tokens."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, Pairs):
        members = (f"{json_text(k)}{between}:{between}{json_text(v, between)}" for k, v in value)
        return "{" + between + f",{between}".join(members) + between + "}"
    if isinstance(value, list):
        return "[" + f",{between}".join(json_text(v, between) for v in value) + "]"
    return json.dumps(value)


def in_pairs(value):
    """Return a JSON value with its objects as `Pairs`."""
    if isinstance(value, dict):
        return Pairs([key, in_pairs(v)] for key, v in value.items())
    return [in_pairs(v) for v in value] if isinstance(value, list) else value


def positions(value) -> Iterator[tuple[list, int]]:
    """Yield the position of every value in a JSON value, as a list and an index in it."""
    for at, item in enumerate(value if isinstance(value, list) else ()):
        inner = (item, 1) if isinstance(value, Pairs) else (value, at)
        yield inner
        yield from positions(inner[0][inner[1]])


def damage_value(tree, rng: random.Random) -> None:
    """Change, remove or duplicate something anywhere in a JSON value."""
    parent, at = rng.choice(list(positions(tree)))
    kind = rng.randrange(7)
    if kind == 0 and isinstance(parent[at], int):
        parent[at] = rng.choice((parent[at] + 1, parent[at] - 1, parent[at] * 2, -parent[at]))
    elif kind == 1:
        other, index = rng.choice(list(positions(tree)))
        parent[at] = Text(json_text(other[index]))  # a copy: no value may contain itself
    elif kind <= 4:
        parent[at] = rng.choice(ODD)
    else:
        objects = [tree] + [p[i] for p, i in positions(tree) if isinstance(p[i], Pairs)]
        damage_keys(rng.choice(objects), rng)


def damage_keys(pairs: Pairs, rng: random.Random) -> None:
    """Remove, duplicate, rename or add a key."""
    pair = rng.choice(pairs) if pairs else ["a", 1]
    kind = rng.randrange(4)
    if kind == 0 and pairs:
        pairs.remove(pair)
    elif kind == 1:
        key = spelled(pair[0], rng) if not isinstance(pair[0], Text) else pair[0]
        pairs.insert(rng.randrange(len(pairs) + 1), [key, pair[1]])
    elif kind == 2:
        pair[0] = rng.choice((f"{pair[0]}x", str(pair[0]).upper(), "", "a\0b", Text('"\\udfff"')))
    else:
        pairs.append([f"new{rng.randrange(9)}", rng.choice(ODD)])


def damage_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Flip, insert, delete, cut or append bytes, or continue with those of another file."""
    limit = min(len(data), 400) if rng.random() < 0.8 else len(data)
    at = rng.randrange(limit + 1)
    some = rng.choice((b"\0", b" ", b'"', b"{", b"}", b",", b"\xff", b"\xef\xbb\xbf", b"0", b"1"))
    count = rng.choice((1, 1, 1, 2, 8, 100))
    kind = rng.randrange(7)
    if kind <= 1 and data:
        at = rng.randrange(limit)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + some * count + data[at:]
    if kind == 3:
        return data[:at] + data[at + count :]
    if kind == 4:
        return data[: rng.choice((at, max(0, len(data) - count)))]
    if kind == 5:
        return data + some * count
    return data[:at] + other[rng.randrange(len(other) + 1) :]


_BITS = {"U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "I16": 16}
_BITS |= {"F32": 32, "U32": 32, "F64": 64, "I64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6}
_SHAPES = ((), (1,), (8,), (4, 2), (3, 8), (2, 2, 4), (0,), (0, 3), (1, 1, 8), (16, 4))


@dataclass
class Header:
    """A safetensors file to be written; valid until it is changed."""

    entries: Pairs
    data: bytes
    before: str = ""
    after: str = ""
    between: str = ""
    encoding: str = "utf-8"
    longer: int = 0  # added to its length field

    def __bytes__(self) -> bytes:
        text = (self.before + json_text(self.entries, self.between) + self.after).encode(
            self.encoding, "surrogatepass"
        )
        whole = shard_bytes(text, self.data)
        length = (len(text) + self.longer) % 2**64
        return length.to_bytes(8, "little") + whole[8:]


def valid_header(rng: random.Random) -> Header:
    """Return a valid file: a few tensors of several dtypes, with random data, so that data read
    from a wrong offset differs."""
    entries, at = [], 0
    for number in range(rng.randrange(1, 6)):
        dtype, shape = rng.choice(list(_BITS)), rng.choice(_SHAPES)
        bits = prod(shape) * _BITS[dtype]
        if bits % 8 == 0:
            entry = in_pairs({"dtype": dtype, "shape": shape, "data_offsets": 0})
            entry[1][1] = list(shape)
            entry[2][1] = [at, at := at + bits // 8]
            entries.append([rng.choice("abcdeü") + f"t{number}.weight"[: rng.randrange(10)], entry])
    if len({name for name, _ in entries}) != len(entries):
        entries = [[f"{number}{name}", entry] for number, (name, entry) in enumerate(entries)]
    return Header(Pairs(entries), rng.randbytes(at))


# Changes after which a header is still valid, as another writer might write it.


def _in_another_order(h: Header, rng: random.Random) -> None:
    rng.shuffle(h.entries)
    for _, entry in h.entries:
        rng.shuffle(entry)


def _with_spaces(h: Header, rng: random.Random) -> None:
    h.before, h.after, h.between = (rng.choice(SPACES) for _ in range(3))


def _with_metadata(h: Header, rng: random.Random) -> None:
    if all(name != "__metadata__" for name, _ in h.entries):
        value = in_pairs(dict.fromkeys("abc"[: rng.randrange(4)], "x" * rng.randrange(9)))
        h.entries.insert(rng.randrange(len(h.entries) + 1), ["__metadata__", value])


def _spelled_otherwise(h: Header, rng: random.Random) -> None:
    for pair in h.entries:
        pair[0] = spelled(pair[0], rng) if not isinstance(pair[0], Text) else pair[0]
        if isinstance(pair[1], Pairs) and rng.random() < 0.5:
            for inner in pair[1]:
                inner[0] = spelled(inner[0], rng) if not isinstance(inner[0], Text) else inner[0]


def _with_an_empty_tensor(h: Header, rng: random.Random) -> None:
    offset = rng.choice((0, len(h.data), *_boundaries(h)))
    entry = in_pairs({"dtype": "F32", "shape": [rng.choice((0, 0, 3)), 0], "data_offsets": []})
    entry[2][1] = [offset, offset]
    h.entries.append([f"empty{rng.randrange(10**6)}", entry])


def _boundaries(h: Header) -> list[int]:
    offsets = [v for _, e in h.entries if isinstance(e, Pairs) for k, v in e if k == "data_offsets"]
    return [o[0] for o in offsets if isinstance(o, list) and o and type(o[0]) is int]


HARMLESS = (_in_another_order, _with_spaces, _with_metadata, _spelled_otherwise)
HARMLESS += (_with_an_empty_tensor,)

# Changes that break a rule of the format, or nearly do.


def _entry(h: Header, rng: random.Random) -> list:
    entries = [pair for pair in h.entries if isinstance(pair[1], Pairs)] or [["a", Pairs()]]
    return rng.choice(entries)


def _field(h: Header, rng: random.Random, field: str) -> list:
    return next((pair for pair in _entry(h, rng)[1] if pair[0] == field), [field, 0])


def _offsets(h: Header, rng: random.Random) -> None:
    pair = _field(h, rng, "data_offsets")
    begin, end = pair[1] if isinstance(pair[1], list) and len(pair[1]) == 2 else (0, 4)
    if type(begin) is not int or type(end) is not int:
        return
    by = rng.choice((1, -1, 4, 2**40, -begin))
    moved = [[begin + by, end + by], [begin, end + by], [begin + by, end], [end, begin]]
    odd = rng.choice(ODD)
    pair[1] = rng.choice((*moved, [odd, end], [begin, odd], [begin, end, end], [begin], odd))


def _shape(h: Header, rng: random.Random) -> None:
    pair = _field(h, rng, "shape")
    if isinstance(pair[1], list):
        shape = list(pair[1])
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((*ODD, 1, 1, 1)))
        same = [[1] * rng.randrange(12) + pair[1], pair[1][::-1]]
        pair[1] = rng.choice((shape, shape, [2**32, 2**32, 0], [0, 2**50], *same, [*same[0], 2]))


def _dtype(h: Header, rng: random.Random) -> None:
    pair = _field(h, rng, "dtype")
    code = str(pair[1])
    odd = (code.lower(), f" {code}", [code], in_pairs({code: None}), in_pairs({code: []}), "U7")
    pair[1] = rng.choice((*odd, *_BITS))


def _metadata(h: Header, rng: random.Random) -> None:
    odd = (None, [], {}, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"": ""}, {"a": "\0"}, 3, "a")
    more = ('{"a":"b","a":"c"}', '{"a":"\\ud800"}', '{"\\udfff":"a"}', '{"a":"\n"}')
    h.entries.append(["__metadata__", rng.choice((*map(in_pairs, odd), *map(Text, more)))])


def _twice(h: Header, rng: random.Random) -> None:
    pair = _entry(h, rng)
    key = spelled(pair[0], rng) if not isinstance(pair[0], Text) else pair[0]
    h.entries.append([key, Pairs(list(inner) for inner in pair[1])])
    if rng.random() < 0.3:
        _offsets(h, rng)


def _as_an_array(h: Header, rng: random.Random) -> None:
    pair = _entry(h, rng)
    pair[1] = [value for _, value in pair[1]]


def _keys(h: Header, rng: random.Random) -> None:
    damage_keys(rng.choice((h.entries, _entry(h, rng)[1])), rng)


def _encoding(h: Header, rng: random.Random) -> None:
    h.encoding = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32"))
    h.before += rng.choice(("", "\ufeff", "\0", "\x0b", "//\n"))


def _length(h: Header, rng: random.Random) -> None:
    h.longer = rng.choice((1, -1, 8, -8, 2**20, 2**32, 10**8, 2**63, rng.randrange(-99, 99)))


def _padding(h: Header, rng: random.Random) -> None:
    h.after += rng.choice(("\0", "\x0c", "\u00a0", "\u2028", "x", "{}", ",", " \0 ", " " * 5000))


def _data(h: Header, rng: random.Random) -> None:
    h.data = rng.choice((h.data[:-1], h.data[1:], h.data + b"\0", h.data * 2, b""))


def _anything(h: Header, rng: random.Random) -> None:
    if h.entries:
        damage_value(h.entries, rng)


HARMFUL = (_offsets, _shape, _dtype, _metadata, _twice, _as_an_array, _keys, _encoding, _length)
HARMFUL += (_padding, _data, _anything, _anything)


def files(
    seed: int, count: int, valid: Callable[[random.Random], Header] = valid_header
) -> Iterator[bytes]:
    """Yield `count` safetensors files, about a third of them valid or nearly valid."""
    rng = random.Random(seed)
    for _ in range(count):
        header = valid(rng)
        for change in rng.choices(HARMLESS, k=rng.randrange(3)):
            change(header, rng)
        kind = rng.random()
        for change in rng.choices(HARMFUL, k=0 if kind < 0.4 else rng.choice((1, 1, 1, 2, 3))):
            change(header, rng)
        file = bytes(header)
        if 0.2 < kind < 0.4:
            for _ in range(rng.choice((1, 1, 2, 4))):
                file = damage_bytes(file, rng, bytes(valid(rng)))
        yield file


def json_files(seed: int, count: int, values: list) -> Iterator[bytes]:
    """Yield `count` JSON files, each from one of these values."""
    rng = random.Random(seed)
    for _ in range(count):
        tree = in_pairs(rng.choice(values))
        kind = rng.random()
        for _ in range(0 if kind < 0.25 else rng.choice((1, 1, 1, 2, 4))):
            if tree:
                damage_value(tree, rng)
        between = rng.choice(SPACES)
        encoding = "utf-8" if kind < 0.9 else rng.choice(("utf-8-sig", "utf-16", "utf-32"))
        file = json_text(tree, between).encode(encoding, "surrogatepass")
        if 0.1 < kind < 0.25:
            file = damage_bytes(file, rng, file[::-1])
        yield file
