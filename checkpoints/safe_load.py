"""
Files of torch.save from unknown origin: checked before torch.load reads them, so that a small file
neither runs code nor takes a lot of time or memory.

The archive may hold uncompressed records only, together no larger than the file. The pickle may
describe a limited number of objects, each counted as often as it is referred to: lists that contain
a list twice, sixty levels deep, are two kilobytes and 2**60 items to whoever hashes or prints them.
A tensor may not exceed its record.
"""

import os
import pickletools
import re
import struct
import zipfile
from typing import Any

import torch

from runtime.untrusted import clip

ZIP_SIGNATURE = b"PK\3\4"
# A pickle of protocol 2 of torch.serialization's magic number.
OLD_SIGNATURE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Local file header: signature, ..., lengths of the name and of the extra field.
LOCAL_HEADER = struct.Struct("<4s22x2H")
# Objects and characters of texts in a pickle, with repetitions. A tensor has about 100.
MIN_OBJECT_LIMIT = 1 << 20
OBJECTS_PER_OPCODE = 4  # at least, of a file at the limit; a tensor has about 40 opcodes
BYTES_PER_OBJECT = 64  # a file of N bytes may have N / BYTES_PER_OBJECT objects, if that is more
MAX_DEPTH = 100  # of nested objects
MAX_REPETITION = 4  # bytes of all tensors per byte of the file: tied tensors count twice
TOO_LARGE = "its pickle describes far more objects than a checkpoint has, or nests them too deeply"
# The classes and functions in the pickle of a state dict. torch.load allows more, and some of them
# take any amount of memory or time: bytearray(10**12).
DATA_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    r"|torch (Size|device|bool|half|float|double|short|int|long|\w+Storage)"
    r"|torch (b?float|u?int|complex)\d\w*"
    r"|torch\.storage (Untyped|Typed)Storage"
)
# Opcodes by what they do
PUT = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
GET = ("BINGET", "LONG_BINGET", "GET")
ADD = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
REMOVE = ("POP", "POP_MARK")  # written for tuples that contain themselves only
MARK = pickletools.markobject


def is_old_pickle(path: str) -> bool:
    """Whether a file begins as torch.save wrote it before PyTorch 1.6, without a zip archive."""
    with open(path, "rb") as file:
        return file.read(len(OLD_SIGNATURE)) == OLD_SIGNATURE


def check_not_old(path: str) -> None:
    """Raise ValueError if is_old_pickle."""
    if is_old_pickle(path):
        raise ValueError(
            f"{path}: a file as PyTorch wrote it before version 1.6; write it again with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )


def safe_load(path: str, map_location: str, mmap: bool = False) -> Any:
    """torch.load with weights_only=True, after the checks.

    mmap: map the tensors into memory instead of reading them. Raises ValueError or one of the
    exceptions of zipfile, pickletools and torch.load."""
    content = load_on_meta(path, read_records(path))
    if map_location == "meta":
        return content
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def load_on_meta(path: str, records: dict[int, zipfile.ZipInfo]) -> Any:
    """The content of a file with its tensors on the meta device, which holds no values."""
    with open(path, "rb") as file:
        content = torch.load(file, map_location="meta", weights_only=True)
    check_tensors(content, records, os.path.getsize(path))
    return content


# The archive


def read_records(path: str) -> dict[int, zipfile.ZipInfo]:
    """The records of an archive by the offset of their content, after check_pickle has read the
    pickle. Raises ValueError for damage."""
    records: dict[int, zipfile.ZipInfo] = {}
    size = os.path.getsize(path)
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise ValueError("it is not a file")
    pickles = []
    total = 0
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset)
            signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            offset = record.header_offset + LOCAL_HEADER.size + sum(lengths)
            is_stored = record.compress_type == zipfile.ZIP_STORED
            is_plain = is_stored and record.file_size == record.compress_size
            if signature != ZIP_SIGNATURE or not is_plain or offset + record.file_size > size:
                raise ValueError(f"its record {record.filename[:50]} is incomplete or compressed")
            records[offset] = record
            total += record.file_size
            if total > size:
                raise ValueError("its records overlap")
            if re.search(r"/data/[^/]+$", record.filename):
                continue
            content = archive.read(record)  # verifies the checksum
            if record.filename.lower().endswith(".pkl"):  # PyTorch ignores the case
                pickles.append(content)
    if len(pickles) > 1:
        raise ValueError("it has more than one pickle")
    for content in pickles:
        check_pickle(content, max(MIN_OBJECT_LIMIT, size // BYTES_PER_OBJECT))
    return records


# The pickle


class Node:
    """An object of a pickle that may contain others."""

    __slots__ = ("children", "depth", "is_open", "size")

    def __init__(self, children: "list[Node | int]"):
        self.children = children
        self.size = 1 + sum(map(size_of, children))
        self.depth = 0  # 0: not known yet
        self.is_open = False  # its children are being measured

    def add(self, children: "list[Node | int]") -> None:
        """Add children to a container."""
        self.children += children
        self.size += sum(map(size_of, children))


def size_of(value: Node | int) -> int:
    """The number of objects in an object, as far as it is known. An object that contains no
    others is represented by that number: 1 and the characters of a text."""
    return value if isinstance(value, int) else value.size


def check_pickle(content: bytes, limit: int, allowed: re.Pattern | None = DATA_GLOBALS) -> None:
    """Raise ValueError if a pickle describes more than limit objects, counted as often as they are
    referred to, or nests them too deeply or in a circle, or names a class that is not allowed, or
    makes objects that are not part of the result.

    Nothing is built or called. The size of an object is checked when it is made, because tuples
    can be keys of dictionaries, which are hashed while the pickle is read; and at the end, because
    lists and dictionaries grow after they are made."""
    stack: list[Node | int | None] = []  # None: a mark
    memo: dict[int, Node | int] = {}
    nodes: list[Node] = []
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in PUT:
            memo[len(memo) if argument is None else argument] = top_of(stack)
        elif opcode.name in GET:
            stack.append(memo[argument])
        elif opcode.name == "DUP":
            stack.append(top_of(stack))
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            check_opcode(opcode, argument, allowed)
            operands = pop_operands(stack, opcode.stack_before) if opcode.stack_before else []
            result = apply_opcode(opcode, argument, operands)
            if opcode.stack_after:
                stack.append(result)
            if isinstance(result, Node) and opcode.name not in ADD:
                nodes.append(result)
            if max(count * OBJECTS_PER_OPCODE, size_of(result)) > limit:
                raise ValueError(TOO_LARGE)
    if stack:  # each of these could take as long as the limit allows for all
        raise ValueError("its pickle is damaged")
    measure(nodes, limit)


def check_opcode(opcode: pickletools.OpcodeInfo, argument: Any, allowed: re.Pattern | None) -> None:
    """Raise ValueError if an opcode names a class that is not allowed, or removes an object."""
    if opcode.name == "GLOBAL" and allowed and not allowed.fullmatch(argument):
        raise ValueError(f"it holds more than data: GLOBAL {clip(argument)}")
    if opcode.name in REMOVE:
        raise ValueError("its pickle is damaged")


def top_of(stack: list[Node | int | None]) -> Node | int:
    """The last object of the stack. Raises ValueError if there is none."""
    if not stack or stack[-1] is None:
        raise ValueError("its pickle is damaged")
    return stack[-1]


def pop_operands(
    stack: list[Node | int | None], expected: list[pickletools.StackObject]
) -> list[Node | int]:
    """Remove the operands of an opcode from the stack. Raises ValueError if they are missing."""
    operands: list[Node | int] = []
    if MARK in expected:
        while stack and stack[-1] is not None:
            operands.append(top_of(stack))
            stack.pop()
        if not stack:
            raise ValueError("its pickle is damaged")
        stack.pop()  # the mark
    for _ in range(expected.index(MARK) if MARK in expected else len(expected)):
        operands.append(top_of(stack))
        stack.pop()
    return operands[::-1]


def apply_opcode(
    opcode: pickletools.OpcodeInfo, argument: Any, operands: list[Node | int]
) -> Node | int:
    """The object that an opcode makes. A container to which it adds is the first operand."""
    if opcode.name in ADD:
        container = operands[0]
        if not isinstance(container, Node):
            raise ValueError("its pickle is damaged")
        container.add(operands[1:])
        return container
    if operands or opcode.name in EMPTY:
        return Node(operands)
    if isinstance(argument, int):
        return 1 + argument.bit_length() // 8
    return 1 + (len(argument) if isinstance(argument, str | bytes | bytearray) else 0)


def measure(nodes: list[Node], limit: int) -> None:
    """Set the size and depth of all nodes. Raises ValueError for more than limit objects, too
    deep nesting, or a circle."""
    for root in nodes:
        path = [root]
        while path:
            node = path[-1]
            if node.depth:  # measured before, or since it was put on the path
                path.pop()
                continue
            if not node.children:
                node.depth = 1
                continue
            inner = [child for child in node.children if isinstance(child, Node)]
            unknown = [child for child in inner if not child.depth]
            if unknown and node.is_open:
                raise ValueError("an object in its pickle contains itself")
            if unknown:
                node.is_open = True
                path += unknown
                continue
            path.pop()
            node.size = 1 + sum(map(size_of, node.children))
            node.depth = 1 + max((child.depth for child in inner), default=0)
            if node.size > limit or node.depth > MAX_DEPTH:
                raise ValueError(TOO_LARGE)


# The tensors


def check_tensors(content: Any, records: dict[int, zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError unless all tensors on the meta device are in the records of a file of this
    size, and together not much larger than it."""
    remaining = MAX_REPETITION * size
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            check_tensor(value, records)
            remaining -= value.numel() * value.dtype.itemsize
            if remaining < 0:
                raise ValueError("its tensors are larger than the file")
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def check_tensor(tensor: torch.Tensor, records: dict[int, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """The record of a tensor on the meta device. Raises ValueError if it does not contain it."""
    storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
    record = records.get(getattr(storage, "_checkpoint_offset", None) or -1)
    if storage is None or record is None or storage.nbytes() != record.file_size:
        raise ValueError("a tensor has no record of its size")
    if record.file_size % tensor.dtype.itemsize:
        raise ValueError("the size of a tensor's record is not a multiple of its dtype's")
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    capacity = record.file_size // tensor.dtype.itemsize
    if tensor.numel() and not tensor.numel() <= last + 1 <= capacity:
        raise ValueError("a tensor exceeds its record")
    return record
