"""
Random damage to the bytes of a file or to the values that they encode, for tests/tools/fuzz.py.
"""

import copy
import io
import itertools
import json
import math
import pickletools
import random
import re
import struct
import zipfile

import numpy as np

# Damage to bytes

BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x0A, 0x22)
EXTREMES = (0, 1, 2, 3, 4, 7, 8, 9, 16, 30, 64, 255, 256, 2**15, 2**16, 2**24)
EXTREMES += (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def zones_of(rng: random.Random, content: bytes) -> list[tuple[int, int]]:
    """The parts of a file that are damaged equally often: its headers, and all of it."""
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
    """The bytes after one or several edits."""
    zones, content = zones_of(rng, content), bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 6))):
        if content:
            start, end = rng.choice(zones)
            rng.choice(BYTE_EDITS)(rng, content, min(rng.randrange(start, end), len(content) - 1))
    return bytes(content)


def flip_bits(rng: random.Random, content: bytearray, at: int) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        content[at] ^= 1 << rng.randrange(8)
        at = min(len(content) - 1, at + rng.randrange(1, 64))


def overwrite_bytes(rng: random.Random, content: bytearray, at: int) -> None:
    for position in range(at, min(len(content), at + rng.choice((1, 1, 1, 2, 4, 16)))):
        content[position] = rng.choice((*BYTES, rng.randrange(256)))


def overwrite_field(rng: random.Random, content: bytearray, at: int) -> None:
    """Replace a number of 4 or 8 bytes, aligned or not, by an extreme or a close one."""
    size = rng.choice((4, 8))
    at = rng.choice((at, at // size * size))
    old = int.from_bytes(content[at : at + size], "little")
    new = rng.choice(
        (rng.choice(EXTREMES), old + 1, old - 1, 2 * old, old + rng.choice((-64, -32, 32, 64)))
    )
    content[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")[: len(content) - at]


def truncate(rng: random.Random, content: bytearray, at: int) -> None:
    del content[rng.choice((at, max(0, len(content) - rng.randrange(1, 65)))) :]


def extend(rng: random.Random, content: bytearray, at: int) -> None:
    tail = (
        b"\0" * rng.randrange(1, 65),
        rng.randbytes(rng.randrange(1, 65)),
        bytes(content[at:]),
        bytes(content),
    )
    content += rng.choice(tail)


def delete_range(rng: random.Random, content: bytearray, at: int) -> None:
    del content[at : at + random_length(rng)]


def duplicate_range(rng: random.Random, content: bytearray, at: int) -> None:
    content[at:at] = content[at : at + random_length(rng)]


def insert_range(rng: random.Random, content: bytearray, at: int) -> None:
    content[at:at] = rng.choice((bytes(random_length(rng)), rng.randbytes(random_length(rng))))


def copy_range(rng: random.Random, content: bytearray, at: int) -> None:
    """Copy a range over another one, near or far; the length stays."""
    count = random_length(rng)
    to = rng.choice((rng.randrange(len(content)), min(len(content), at + rng.randrange(256))))
    part = content[at : at + count][: len(content) - to]
    content[to : to + len(part)] = part


def random_length(rng: random.Random) -> int:
    return rng.choice((1, 2, 4, 8, 16, 64, rng.randrange(1, 300), rng.randrange(1, 10_000)))


BYTE_EDITS = (flip_bits, flip_bits, overwrite_bytes, overwrite_field, overwrite_field, truncate)
BYTE_EDITS += (extend, delete_range, duplicate_range, insert_range, copy_range)


# Damage to encoded values, which passes the first checks

DEEP, LONG = "a list in a list ...", "a number of 5000 digits"  # which json.dumps does not write
VALUES = (None, True, False, 0, 1, -1, 2, 3, 8, 64)
VALUES += (0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, math.nan, math.inf)
VALUES += (2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
VALUES += (LONG, DEEP)
VALUES += ("", "x", "0", "nan", "x" * 2000, "a\nb", "\0", "\ud800", "..", "llama3", "linear")
VALUES += ("F16", "I32", "config.json")
VALUES += ([], [[]], ["x"], [1], [1.5, None], [0] * 1000, ["x" * 50] * 50)
VALUES += ({}, {"x": 1}, {"type": "linear", "factor": 0})


def damaged_json(rng: random.Random, text: bytes) -> bytes:
    """JSON with one or several values edited."""
    root = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = choose_element(rng, root)
        edit_value(rng, holder, key)
    encoded = json.dumps(root[0] if root else None, ensure_ascii=rng.choice((True, True, False)))
    encoded = encoded.replace(json.dumps(DEEP), "[" * 100_000).replace(json.dumps(LONG), "9" * 5000)
    return encoded.encode("utf-8", "surrogatepass")


def choose_element(rng: random.Random, root: list) -> tuple[dict | list, object]:
    """A container in root and one of its keys or indices; all depths are equally likely."""
    holder, key = root, 0
    while root and isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    return holder, key


def edit_value(rng: random.Random, holder: dict | list, key: object) -> None:
    """Replace, delete, rename, swap or repeat one element."""
    other = (
        rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(max(1, len(holder)))
    )
    edit = rng.choice(
        ("replace", "replace", "replace", "number", "delete", "rename", "swap", "repeat")
    )
    if not holder:
        return
    value = holder[key]
    if edit == "number" and type(value) in (int, float) and abs(value) < 2**64:
        near = [value + 1, value - 1, value * 2, -value, value + 0.5]
        near += [float(value), str(value), bool(value)]
        holder[key] = rng.choice(near)
    elif edit == "delete":
        del holder[key]
    elif edit == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "", "x" * 2000, "a\nb", str(other)))] = holder.pop(key)
    elif edit == "swap":
        holder[key], holder[other] = holder[other], holder[key]
    elif edit == "repeat" and isinstance(holder, list):
        holder.insert(other, copy.deepcopy(value))
    elif edit == "repeat":
        holder[other] = copy.deepcopy(value)
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with an edited header, whose length is right."""
    (size,) = struct.unpack_from("<Q", content)
    header = damaged_json(rng, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damaged_archive(rng: random.Random, content: bytes) -> bytes:
    """A zip archive with one record edited; its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [[name, archive.read(name)] for name in archive.namelist()]
    pickle = next(record for record in records if record[0].endswith("data.pkl"))
    record, other = rng.choice(records), rng.choice(records)
    edits = ("pickle",) * 6 + ("structure",) * 4
    edits += ("content", "delete", "rename", "swap", "repeat", "bomb", "overlap")
    edit = rng.choice(edits)
    if edit == "pickle":
        pickle[1] = damaged_bytes(rng, pickle[1])
    elif edit == "structure":
        pickle[1] = hostile_pickle(rng, pickle[1])
    elif edit == "bomb":
        record[1] = bytes(BOMB_SIZE)
    elif edit == "content":
        record[1] = damaged_bytes(rng, record[1])
    elif edit == "delete":
        records.remove(record)
    elif edit == "rename":
        record[0] = damaged_bytes(rng, record[0].encode()).decode("latin-1") or "x"
    elif edit == "swap":
        record[1], other[1] = other[1], record[1]
    else:
        records.append(list(record))
    file = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if edit == "bomb" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, record in records:
            info = zipfile.ZipInfo(name.replace("\0", "x"))
            info.compress_type = compression
            archive.writestr(info, record)
        if edit == "overlap":  # many names of one record
            archive.filelist += [copy.copy(archive.filelist[-1]) for _ in range(200)]
    return file.getvalue()


# Structures that a few bytes of pickle describe, and that are large to whoever walks them. torch's
# memo numbers are small; those from FIRST_MEMO on are free.
BOMB_SIZE = 16 << 20  # bytes, compressed a thousandfold
FIRST_MEMO = 1 << 20
ONE = b"K\x01"


def memo_put(number: int) -> bytes:
    """The opcode that names the last object."""
    return b"r" + struct.pack("<I", FIRST_MEMO + number)


def memo_get(number: int) -> bytes:
    """The opcode that refers to a named object."""
    return b"j" + struct.pack("<I", FIRST_MEMO + number)


def shared_lists(depth: int) -> bytes:
    """Each list contains the next one twice."""
    value = ONE + memo_put(0)
    for level in range(1, depth + 1):
        value = b"]" + memo_put(level) + value + b"a" + memo_get(level - 1) + b"a"
    return value


def shared_tuples(depth: int) -> bytes:
    """Each tuple contains the previous one twice. Tuples can be hashed."""
    value = ONE + memo_put(0)
    for level in range(1, depth + 1):
        value += memo_get(level - 1) + b"\x86" + memo_put(level)
    return value


def shared_dicts(depth: int) -> bytes:
    """Each dictionary contains the next one twice."""
    value = ONE + memo_put(0)
    for level in range(1, depth + 1):
        item = b"K\x02" + memo_get(level - 1) + b"s"
        value = b"}" + memo_put(level) + ONE + value + b"s" + item
    return value


def lists_filled_later(depth: int) -> bytes:
    """As shared_lists, but every list is empty when it is added to another one."""
    lists = b"".join(b"]" + memo_put(level) for level in range(depth))
    value = b"](" + lists + b"e"
    for level in range(depth - 1, 0, -1):
        twice = (memo_get(level - 1) + b"a") * 2
        value += memo_get(level) + twice + b"a"
    return value


def text_of(length: int) -> bytes:
    """A text."""
    return b"X" + struct.pack("<I", length) + b"x" * length


STRUCTURES = {
    "lists": shared_lists(60),
    "tuples": shared_tuples(60),
    "dictionaries": shared_dicts(60),
    "lists filled later": lists_filled_later(60),
    "a key": b"}" + shared_tuples(60) + ONE + b"s",
    "a list in itself": b"]" + memo_put(0) + memo_get(0) + b"a",
    "deep lists": b"]" * 3000 + ONE + b"a" * 2999,
    "a long text, repeated": b"](" + text_of(5000) + memo_put(0) + memo_get(0) * 5000 + b"e",
    "a large number": b"\x8a\xff" + b"\x7f" * 255,
    "a text": text_of(5000),
    "bytes of any size": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "a tensor of any size": b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    "a slow encoding": b"c_codecs\nencode\n" + text_of(5000) + text_of(8) + b"\x86R",
    "a call of a list": shared_lists(60) + b")R",
    "many single items": b"]" + (ONE + b"a") * 5000,
    "many single keys": b"}" + (ONE + ONE + b"s") * 3000,
    "a list filled later": b"](]"
    + memo_put(0)
    + memo_get(0) * 8000
    + (b"e" + memo_get(0) + b"(" + ONE * 8000 + b"ea"),
    "keys of values that are not used": shared_tuples(18) + (b"}" + memo_get(18) + b"Ns") * 1000,
}


def pack_torch_file(pickle: bytes, **options) -> bytes:
    """A file of torch.save with this pickle and no tensors. options: of zipfile.ZipFile."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in (("data.pkl", pickle), ("byteorder", "little"), ("version", "3\n")):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def hostile_pickle(rng: random.Random, content: bytes) -> bytes:
    """A pickle with one of its texts or numbers replaced by one of STRUCTURES."""
    leaves = ("BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "NONE", "NEWTRUE")
    opcodes = [*pickletools.genops(content)]
    spans = [
        (position, end)
        for (opcode, _, position), (_, _, end) in itertools.pairwise(opcodes)
        if opcode.name in leaves
    ]
    start, end = rng.choice(spans)
    return content[:start] + rng.choice([*STRUCTURES.values()]) + content[end:]


def damaged_gguf(rng: random.Random, content: bytes) -> bytes:
    """A GGUF file with metadata replaced, repeated or removed, and a header that fits."""
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", content, 4)
    pairs, position = [], 24
    for _ in range(n_pairs):
        end = end_of_value(
            content, end_of_value(content, position, STRING) + 4, type_of_pair(content, position)
        )
        pairs.append(content[position:end])
        position = end
    infos = position
    for _ in range(n_tensors):
        position = end_of_value(content, position, STRING)
        position += 4 + 8 * struct.unpack_from("<I", content, position)[0] + 12
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(pairs))
        key = pairs[at][: end_of_value(pairs[at], 0, STRING)]
        new = rng.choice(
            (key + pack_value(rng, rng.choice(VALUES)), pairs[rng.randrange(len(pairs))], None)
        )
        pairs[at : at + 1] = [] if new is None else [new] * rng.choice((1, 1, 1, 2))
    header = (
        struct.pack("<4sIQQ", b"GGUF", version, n_tensors, len(pairs))
        + b"".join(pairs)
        + content[infos:position]
    )
    return header + b"\0" * (-len(header) % 32) + content[position + -position % 32 :]


# GGUF's types of values: the sizes of the fixed ones, and the others.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
FLOAT32, BOOL, STRING, ARRAY, FLOAT64 = 6, 7, 8, 9, 12


def type_of_pair(content: bytes, pair: int) -> int:
    """The type of the value in the metadata pair that starts there."""
    return struct.unpack_from("<I", content, end_of_value(content, pair, STRING))[0]


def end_of_value(content: bytes, position: int, value_type: int) -> int:
    """Where the value that starts at position ends."""
    if value_type in SIZES:
        return position + SIZES[value_type]
    if value_type == STRING:
        return position + 8 + struct.unpack_from("<Q", content, position)[0]
    element_type, count = struct.unpack_from("<IQ", content, position)
    position += 12
    if element_type in SIZES:
        return position + SIZES[element_type] * count
    for _ in range(count):
        position = end_of_value(content, position, element_type)
    return position


def pack_value(rng: random.Random, value: object) -> bytes:
    """A value as GGUF stores it, after its type."""
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        return struct.pack("<IQ", STRING, len(encoded)) + encoded
    if isinstance(value, (list, dict)):
        values = [pack_value(rng, element) for element in value]
        element_type = values[0][:4] if values else struct.pack("<I", rng.choice((4, 8, 9)))
        elements = b"".join(packed[4:] for packed in values)
        return struct.pack("<I", ARRAY) + element_type + struct.pack("<Q", len(values)) + elements
    if isinstance(value, float):
        value_type = rng.choice((FLOAT32, FLOAT64))
        if value_type == FLOAT64:
            return struct.pack("<Id", FLOAT64, value)
        return struct.pack("<If", FLOAT32, np.float32(np.clip(value, -3e38, 3e38)))
    if isinstance(value, bool) or value is None:
        return struct.pack("<IB", BOOL, value or rng.choice((0, 2)))
    value_type = rng.choice([*SIZES])
    low_bytes = (value % (1 << 64)).to_bytes(8, "little")[: SIZES[value_type]]
    return struct.pack("<I", value_type) + low_bytes
