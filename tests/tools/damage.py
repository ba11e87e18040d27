"""
Ways to damage the bytes of a file, or what the bytes say, at random: what tests/tools/fuzz.py feeds to
the readers of formats.
"""

import copy
import io
import json
import math
import random
import re
import struct
import zipfile

import numpy as np

# Damage to bytes

BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x0A, 0x22)
EXTREMES = (
    *(0, 1, 2, 3, 4, 7, 8, 9, 16, 30, 64, 255, 256, 2**15, 2**16, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)


def zones_of(rng: random.Random, content: bytes) -> list[tuple[int, int]]:
    """The parts of a file, each to be hit as often as the others: where its structure is said, and
    all of it."""
    size = len(content)
    names = content.rfind(b".weight") + 64  # headers and pickles spell the tensors
    zones = [(0, size), (0, 256), (size - 256, size), (0, names), (names - 1024, names)]
    if is_zip(content):
        record = rng.choice([match.start() for match in re.finditer(rb"PK\x03\x04", content)])
        zones += [(content.find(b"PK\1\2"), size), (record, record + 64)]
    return [
        (max(0, start), min(size, end)) for start, end in zones if min(size, end) > max(0, start)
    ]


def is_zip(content: bytes) -> bool:
    return content.startswith(b"PK\3\4")


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    zones, content = zones_of(rng, content), bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 6))):
        if content:
            start, end = rng.choice(zones)
            rng.choice(BYTE_EDITS)(rng, content, min(rng.randrange(start, end), len(content) - 1))
    return bytes(content)


def flip_bits(rng, content, at):
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        content[at] ^= 1 << rng.randrange(8)
        at = min(len(content) - 1, at + rng.randrange(1, 64))


def overwrite_bytes(rng, content, at):
    for position in range(at, min(len(content), at + rng.choice((1, 1, 1, 2, 4, 16)))):
        content[position] = rng.choice((*BYTES, rng.randrange(256)))


def overwrite_field(rng, content, at):
    """A whole number of 4 or 8 bytes, aligned or not, becomes an extreme one or its neighbour."""
    size = rng.choice((4, 8))
    at = rng.choice((at, at // size * size))
    old = int.from_bytes(content[at : at + size], "little")
    new = rng.choice(
        (rng.choice(EXTREMES), old + 1, old - 1, 2 * old, old + rng.choice((-64, -32, 32, 64)))
    )
    content[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")[: len(content) - at]


def truncate(rng, content, at):
    del content[rng.choice((at, max(0, len(content) - rng.randrange(1, 65)))) :]


def extend(rng, content, at):
    tail = (
        b"\0" * rng.randrange(1, 65),
        rng.randbytes(rng.randrange(1, 65)),
        bytes(content[at:]),
        bytes(content),
    )
    content += rng.choice(tail)


def delete_range(rng, content, at):
    del content[at : at + length(rng)]


def duplicate_range(rng, content, at):
    content[at:at] = content[at : at + length(rng)]


def insert_range(rng, content, at):
    content[at:at] = rng.choice((bytes(length(rng)), rng.randbytes(length(rng))))


def copy_range(rng, content, at):
    """Over another place, near or far, so that the length stays."""
    count = length(rng)
    to = rng.choice((rng.randrange(len(content)), min(len(content), at + rng.randrange(256))))
    part = content[at : at + count][: len(content) - to]
    content[to : to + len(part)] = part


def length(rng) -> int:
    return rng.choice((1, 2, 4, 8, 16, 64, rng.randrange(1, 300), rng.randrange(1, 10_000)))


BYTE_EDITS = (
    *(flip_bits, flip_bits, overwrite_bytes, overwrite_field, overwrite_field, truncate, extend),
    *(delete_range, duplicate_range, insert_range, copy_range),
)


# Damage to what the bytes say, so that it is not refused at the door

DEEP, LONG = "a list in a list ...", "a number of 5000 digits"  # what json.dumps would not write
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        8,
        64,
        0.0,
        0.5,
        -0.5,
        1e-320,
        1e308,
        -1e308,
        math.nan,
        math.inf,
    ),
    *(
        2**15,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        10**400,
        LONG,
        DEEP,
    ),
    *(
        "",
        "x",
        "0",
        "nan",
        "x" * 2000,
        "a\nb",
        "\0",
        "\ud800",
        "..",
        "llama3",
        "linear",
        "F16",
        "I32",
        "config.json",
    ),
    *(
        [],
        [[]],
        ["x"],
        [1],
        [1.5, None],
        [0] * 1000,
        ["x" * 50] * 50,
        {},
        {"x": 1},
        {"type": "linear", "factor": 0},
    ),
)


def damaged_json(rng: random.Random, text: bytes) -> bytes:
    root = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = place_in(rng, root)
        edit_value(rng, holder, key)
    encoded = json.dumps(root[0] if root else None, ensure_ascii=rng.choice((True, True, False)))
    encoded = encoded.replace(json.dumps(DEEP), "[" * 100_000).replace(json.dumps(LONG), "9" * 5000)
    return encoded.encode("utf-8", "surrogatepass")


def place_in(rng: random.Random, root: list) -> tuple[dict | list, object]:
    """A container within root, and a key or index of it: any depth as likely as the others."""
    holder, key = root, 0
    while root and isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    return holder, key


def edit_value(rng: random.Random, holder: dict | list, key):
    other = (
        rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(max(1, len(holder)))
    )
    kind = rng.choice(
        ("replace", "replace", "replace", "number", "delete", "rename", "swap", "repeat")
    )
    if not holder:
        return
    value = holder[key]
    if kind == "number" and type(value) in (int, float) and abs(value) < 2**64:
        near = (
            value + 1,
            value - 1,
            value * 2,
            -value,
            value + 0.5,
            float(value),
            str(value),
            bool(value),
        )
        holder[key] = rng.choice(near)
    elif kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "", "x" * 2000, "a\nb", str(other)))] = holder.pop(key)
    elif kind == "swap":
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "repeat" and isinstance(holder, list):
        holder.insert(other, copy.deepcopy(value))
    elif kind == "repeat":
        holder[other] = copy.deepcopy(value)
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header, of the right length."""
    (size,) = struct.unpack_from("<Q", content)
    header = damaged_json(rng, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damaged_archive(rng: random.Random, content: bytes) -> bytes:
    """Other records, with their right sums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [[name, archive.read(name)] for name in archive.namelist()]
    pickle = next(record for record in records if record[0].endswith("data.pkl"))
    record, other = rng.choice(records), rng.choice(records)
    kind = rng.choice(("pickle",) * 6 + ("content", "delete", "rename", "swap", "repeat"))
    if kind == "pickle":
        pickle[1] = damaged_bytes(rng, pickle[1])
    elif kind == "content":
        record[1] = damaged_bytes(rng, record[1])
    elif kind == "delete":
        records.remove(record)
    elif kind == "rename":
        record[0] = damaged_bytes(rng, record[0].encode()).decode("latin-1") or "x"
    elif kind == "swap":
        record[1], other[1] = other[1], record[1]
    else:
        records.append(list(record))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, record in records:
            archive.writestr(zipfile.ZipInfo(name.replace("\0", "x")), record)
    return file.getvalue()


def damaged_gguf(rng: random.Random, content: bytes) -> bytes:
    """Another key-value pair in the place of one, one more or one less, and a header that fits."""
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", content, 4)
    pairs, position = [], 24
    for _ in range(n_pairs):
        end = end_of_value(
            content, end_of_value(content, position, 8) + 4, kind_at(content, position)
        )
        pairs.append(content[position:end])
        position = end
    infos = position
    for _ in range(n_tensors):
        position = end_of_value(content, position, 8)
        position += 4 + 8 * struct.unpack_from("<I", content, position)[0] + 12
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(pairs))
        key = pairs[at][: end_of_value(pairs[at], 0, 8)]
        new = rng.choice(
            (key + packed(rng, rng.choice(VALUES)), pairs[rng.randrange(len(pairs))], None)
        )
        pairs[at : at + 1] = [] if new is None else [new] * rng.choice((1, 1, 1, 2))
    header = (
        struct.pack("<4sIQQ", b"GGUF", version, n_tensors, len(pairs))
        + b"".join(pairs)
        + content[infos:position]
    )
    return header + b"\0" * (-len(header) % 32) + content[position + -position % 32 :]


SIZES = {
    **{0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
}  # of GGUF's kinds of values


def kind_at(content: bytes, pair: int) -> int:
    return struct.unpack_from("<I", content, end_of_value(content, pair, 8))[0]


def end_of_value(content: bytes, position: int, kind: int) -> int:
    if kind in SIZES:
        return position + SIZES[kind]
    if kind == 8:
        return position + 8 + struct.unpack_from("<Q", content, position)[0]
    kind, count = struct.unpack_from("<IQ", content, position)
    position += 12
    if kind in SIZES:
        return position + SIZES[kind] * count
    for _ in range(count):
        position = end_of_value(content, position, kind)
    return position


def packed(rng: random.Random, value) -> bytes:
    """A value as GGUF has it, its kind before it."""
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        return struct.pack("<IQ", 8, len(encoded)) + encoded
    if isinstance(value, (list, dict)):
        values = [packed(rng, element) for element in value]
        kind = values[0][:4] if values else struct.pack("<I", rng.choice((4, 8, 9)))
        return (
            struct.pack("<I", 9)
            + kind
            + struct.pack("<Q", len(values))
            + b"".join(part[4:] for part in values)
        )
    if isinstance(value, float):
        kind, layout = rng.choice(((6, "<If"), (12, "<Id")))
        return struct.pack(
            layout, kind, value if kind == 12 else np.float32(np.clip(value, -3e38, 3e38))
        )
    if isinstance(value, bool) or value is None:
        return struct.pack("<IB", 7, value or rng.choice((0, 2)))
    kind = rng.choice([*SIZES])
    return struct.pack("<I", kind) + (value % (1 << 64)).to_bytes(8, "little")[: SIZES[kind]]
