"""Damage that knows the form of a file: bits, cuts and splices; values of JSON of another type, depth or size."""

import contextlib
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64 + 1, 10**30, -(10**30), 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "x",
        "\0",
        "../x/y",
        "\ud800",
        "é" * 3000,
        "{{ x",
        "%s%n",
        "(",
        "(a+)+$",
        "1e999",
    ),
    *("true", "-1", "auto", "NaN", "[b]x[/b]", "\x1b[2J", "a\nb", "\u202e", "<s>", "0" * 5000),
    *([], {}, [[]], [None], [{}], {"": {}}, {"a": [1]}, [1] * 3000, ["x", 1, None], {"content": 1}, {"type": "x"}),
    *([1, [2, [3]]], [-1], [10**30], [1.5], ["\ud800"]),
)
"""Values in the place of others."""


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def any_bytes(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change bytes somewhere, more often near the ends, where headers and footers stand."""
    if not data:
        return draw.randbytes(draw.randrange(1, 40))
    size = len(data)
    ends = (draw.randrange(size), draw.randrange(min(size, 400)), size - 1 - draw.randrange(min(size, 400)))
    place, changed = draw.choice(ends), bytearray(data)
    match draw.randrange(9):
        case 0 | 1 | 2:
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[min(size - 1, place + draw.randrange(8))] ^= 1 << draw.randrange(8)
        case 3:
            del changed[place:]
        case 4:
            changed[place:place] = draw.randbytes(draw.choice((1, 7, 300)))
        case 5:
            begin = draw.randrange(len(other)) if other else 0
            changed[place : place + draw.choice((4, 60, size))] = other[begin : begin + draw.choice((4, 60, 5000))]
        case 6:
            number = draw.choice((0, 1, -1, 2**31 - 1, 2**62, -(2**63)))
            changed[place : place + 8] = struct.pack("<q", number)
        case 7:
            changed[place : place + draw.choice((1, 30, 500))] = b""
        case 8:
            changed[place:place] = changed[place : place + draw.choice((1, 30, 500))] * draw.choice((1, 3, 50))
    return bytes(changed)


def tree(value: Any, draw: random.Random) -> Any:
    """Change one value, name or place of a JSON tree."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level and len(places) < 3000:
        outer = level.pop(0)
        keys = list(outer) if isinstance(outer, dict) else range(min(len(outer), 40)) if isinstance(outer, list) else ()
        for key in list(keys)[:200]:
            places.append((outer, key))
            level.append(outer[key])
    if not places or draw.random() < 0.03:
        return draw.choice(HOSTILE)
    near = places[: draw.choice((5, 40, 3000))]  # what stands far up decides more
    outer, key = draw.choice(near)
    match draw.randrange(10):
        case 0:
            del outer[key]
        case 1 if isinstance(outer, dict):
            outer[draw.choice(("", "x", "__class__", "\ud800", f"{key}2"))] = outer.pop(key)
        case 2:
            other, name = draw.choice(near)
            outer[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
        case 3:
            outer[key] = [outer[key]] if draw.random() < 0.5 else {"x": outer[key]}
        case 4:
            outer[key] = deep(draw.choice((30, 90, 400)))
        case 5 if isinstance(outer[key], int | float):
            outer[key] = draw.choice((outer[key] + 1, -outer[key], outer[key] * 10**9, outer[key] / 3, str(outer[key])))
        case 6 if isinstance(outer[key], str):
            text = outer[key]
            outer[key] = draw.choice((text * 3, text[: len(text) // 2], text.upper(), text + "\0", text + "\ud800"))
        case _:
            outer[key] = draw.choice(HOSTILE)
    return value


def _keys(value: Any) -> Any:
    return value if isinstance(value, dict) else range(len(value))


def json_text(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change a JSON file: a value most often, or its text."""
    if draw.random() < 0.15:
        return any_bytes(data, draw, other)
    if draw.random() < 0.08:
        text = draw.choice((b"[" * 90_000, b'{"a":' * 5000, b"\xef\xbb\xbf" + data, data.decode().encode("utf-16")))
        return draw.choice((text, data + data, b"null", b"", data.replace(b":", b": 1e999,", 1)))
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = tree(value, draw)
    return json.dumps(value, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def json_lines(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change a line of a file of JSON lines."""
    if not (lines := data.splitlines(keepends=True)):
        return any_bytes(data, draw, other)
    place = draw.randrange(len(lines))
    match draw.randrange(6):
        case 0:
            return any_bytes(data, draw, other)
        case 1:
            lines.insert(place, draw.choice(lines))
        case 2:
            del lines[place]
        case _:
            lines[place] = json_text(lines[place], draw, other) + b"\n"
    return b"".join(lines)


def yaml_text(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change a YAML file: a value most often, or its text."""
    import yaml

    if draw.random() < 0.2:
        return any_bytes(data, draw, other)
    if draw.random() < 0.15:
        line = draw.choice(
            ("a: &a [*a]", "x: !!int y", "x: !!timestamp y", "x: !!python/name:os.system", "- " * 500, "x: [" * 9000)
        )
        lines = data.decode().split("\n")
        lines.insert(draw.randrange(len(lines)), line)
        return "\n".join(lines).encode()
    value = yaml.safe_load(data)
    for _ in range(draw.choice((1, 1, 2))):
        value = tree(value, draw)
    if draw.random() < 0.5:
        with contextlib.suppress(RecursionError):
            return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    return json.dumps(value).encode()


def safetensors(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change the header of a safetensors file, with its length as it then is."""
    if draw.random() < 0.4:
        return any_bytes(data, draw, other)
    size = int.from_bytes(data[:8], "little")
    header = json_text(data[8 : 8 + size], draw, other)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def archive(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change a member of a ZIP archive, with its sum as it then is."""
    if draw.random() < 0.3:
        return any_bytes(data, draw, other)
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(output, "w") as after:
        names = before.namelist()
        chosen = next((name for name in names if name.endswith("data.pkl")), names[0])
        chosen = chosen if draw.random() < 0.8 else draw.choice(names)
        for name in names:
            content = before.read(name)
            after.writestr(name, any_bytes(content, draw, other) if name == chosen else content)
    return output.getvalue()


def text_lines(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Change a text: a line, or a word of it."""
    if draw.random() < 0.4:
        return any_bytes(data, draw, other)
    lines = data.split(b"\n")
    place = draw.randrange(len(lines))
    words = [str(value).encode("utf-8", "surrogatepass")[:9000] for value in HOSTILE]
    lines[place] = draw.choice((lines[place] + draw.choice(words), draw.choice(words), lines[place] * 2, b'"' * 3))
    return b"\n".join(lines)


Mutation = Callable[[bytes, random.Random, bytes], bytes]
BY_ENDING: dict[str, Mutation] = {
    ".json": json_text,
    ".jsonl": json_lines,
    ".yaml": yaml_text,
    ".safetensors": safetensors,
    ".pth": archive,
    ".bin": archive,
    ".csv": text_lines,
    ".jinja": text_lines,
}
"""What is done to a file by the ending of its name; to others, `any_bytes`."""
