"""Read a `torch.save` file as inert data: nothing that the file asks for is imported, called or executed.

The published learned optimizers are pickled modules, and unpickling a file means running it. This is a
pickle machine of its own, for the 28 opcodes that `torch.save` writes (protocol 2) and globals that stay
words. Python's unpickler is not used, not even with a strict `find_class`: there, 0.4 MB of nested tuples
as a dictionary key overflow the C stack (segmentation fault), and 30 nested pairs keep hashing for ten
seconds. Here a key is a string, nothing is compared or hashed in depth, and every amount is bounded.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from zo_finetuner.errors import InputError
from zo_finetuner.reading import open_file

# Limits, beside what the largest published file (772 networks of OPT-30B) has.
MAX_FILE = 16 << 20  # bytes; 2.8 MB
MAX_ENTRIES = 65_536  # files in the zip; 3,092
MAX_PICKLE = 8 << 20  # bytes; 1.1 MB
MAX_OPCODES = 2_000_000  # 390,000, read in 0.7 s
MAX_STACK = 32_768  # values; about 2,000: torch.save writes dictionaries by the thousand

DTYPES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}
MODULES = {"torch.nn.modules.container.Sequential": "Sequential", "torch.nn.modules.linear.Linear": "Linear",
           "torch.nn.modules.activation.Tanh": "Tanh"}
CALLS = {"collections.OrderedDict": "OrderedDict", "__builtin__.set": "set", "builtins.set": "set",
         "torch._utils._rebuild_tensor_v2": "tensor", "torch._utils._rebuild_parameter": "parameter"}


@dataclass(eq=False, repr=False)
class Module:
    """Stand-in for a pickled "Sequential", "Linear" or "Tanh" (its `kind`); `state` was its `__dict__`."""

    kind: str
    state: dict[str, Any] | None = None


@dataclass(eq=False, repr=False)
class _Word:
    """Stand-in for an imported name."""

    name: str


_MARK = object()


def describe(value: object) -> str:
    """What an unpickled value is, in a few words on one line (it may be deep, or contain itself)."""
    if isinstance(value, str):
        return ascii(value[:80])
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Module):
        return f"a {value.kind}"
    if isinstance(value, _Word):
        return value.name
    return repr(value) if value is None or isinstance(value, (bool, int)) else f"a {type(value).__name__}"


def read_torch_file(path: Path) -> tuple[object, str]:
    """The object in a `torch.save` zip, and the name of the folder inside it (what it was first saved as).

    It is made of dicts with string keys, lists, tuples, strings, ints, bools, None, `Module` stand-ins, and
    CPU tensors (fp32 or fp16) that share the storages of the file.
    Raises: InputError naming the file, for anything else, for damage, and for sizes past the limits above.
    """
    try:
        with open_file(path, MAX_FILE) as stream, zipfile.ZipFile(stream) as archive:
            return _read_archive(path, archive)
    except InputError:
        raise
    # What zipfile raises for damaged or exotic archives: encryption, unknown methods, sizes that lie.
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OSError, ValueError,
            OverflowError) as error:
        raise InputError(f"{path}: not a readable torch.save zip ({error}); fetch it again") from error


def _read_archive(path: Path, archive: zipfile.ZipFile) -> tuple[object, str]:
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()) or len(entries) > MAX_ENTRIES:
        raise InputError(f"{path}: an entry stands twice, or more than {MAX_ENTRIES} do; fetch it again")
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise InputError(f"{path}: {len(pickles)} entries <folder>/data.pkl, torch.save writes one")
    folder = pickles[0].removesuffix("/data.pkl")
    unread = MAX_FILE  # bytes that may still be read in all: entries that overlap must not multiply

    def read(name: str, limit: int, expected: int | None = None) -> bytes:
        nonlocal unread
        info = entries.get(f"{folder}/{name}")
        if info is None:
            raise InputError(f"{path}: entry {name} is missing in the zip; fetch it again")
        size = info.file_size
        if expected not in (None, size):
            raise InputError(f"{path}: entry {name} has {size} bytes, not {expected}; fetch it again")
        if info.compress_type != zipfile.ZIP_STORED or size > min(limit, unread):
            raise InputError(f"{path}: entry {name} is compressed, or larger than {limit} bytes")
        unread -= size
        data = archive.read(info)
        if len(data) != size:
            raise InputError(f"{path}: entry {name} is cut off; fetch it again")
        return data

    if f"{folder}/byteorder" in entries and (order := read("byteorder", 16)) != b"little":
        raise InputError(f"{path}: byte order {order.decode('latin1')!a}, only 'little' is read; "
                         "save it again on a little-endian machine")
    return _Machine(path, read).run(read("data.pkl", MAX_PICKLE)), folder


class _Machine:
    """One run over one pickle: a stack, a memo, and a method for each opcode that takes more than a line."""

    def __init__(self, path: Path, read: Callable[..., bytes]) -> None:
        self.path, self.read = path, read
        self.data, self.position = b"", 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, torch.Tensor] = {}

    def refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}; refused, nothing was executed")

    def run(self, data: bytes) -> object:
        if data[:2] != pickle.PROTO + b"\x02":
            self.refuse("data.pkl is no pickle of protocol 2, which torch.save writes")
        self.data, self.position = data, 2
        try:
            for _ in range(MAX_OPCODES):
                code = data[self.position]
                self.position += 1
                if code == pickle.STOP[0]:
                    if len(self.stack) != 1 or self.position != len(data):
                        self.refuse("values or bytes are left over at the end of data.pkl")
                    return self.stack[0]
                if code not in _OPERATIONS:
                    known = pickletools.code2op.get(chr(code))
                    self.refuse(f"opcode {known.name if known else hex(code)} at byte {self.position - 1} of "
                                "data.pkl, which torch.save does not write")
                _OPERATIONS[code](self)
                if len(self.stack) > MAX_STACK:
                    self.refuse(f"more than {MAX_STACK} values on the stack of data.pkl")
        except (IndexError, KeyError, struct.error, UnicodeDecodeError):  # cut off, empty stack, unset memo
            self.refuse(f"data.pkl is damaged at byte {self.position} of {len(data)}")
        self.refuse(f"more than {MAX_OPCODES} opcodes in data.pkl")

    def number(self, layout: str) -> int:
        """The argument that follows the opcode, by its `struct` layout."""
        value, = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return value

    def text(self, end: int | None = None) -> str:
        """UTF-8 up to `end`, by default as many bytes as the four before say."""
        end = self.number("<I") + self.position if end is None else end
        if not self.position <= end <= len(self.data):
            raise IndexError("cut off")
        raw, self.position = self.data[self.position:end], end
        return raw.decode()

    def line(self) -> str:
        line = self.text(self.data.find(b"\n", self.position))
        self.position += 1
        return line

    def above_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise IndexError("no mark")
        values = self.stack[place + 1:]
        del self.stack[place:]
        return values

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("empty stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(flat) % 2:
            self.refuse(f"items for {describe(target)}, which is no dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                self.refuse(f"dictionary key {describe(key)} is no string, or stands twice")
            target[key] = value

    def word(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in DTYPES and name not in MODULES and name not in CALLS:
            self.refuse(f"it asks for {name[:120]!a}, and only Linear, Tanh and Sequential are known")
        self.stack.append(_Word(name))

    def new(self) -> None:
        cls, args = self.pop(2)
        if not isinstance(cls, _Word) or cls.name not in MODULES or not _is_empty(args, tuple):
            self.refuse(f"a new {describe(cls)} from {describe(args)}")
        self.stack.append(Module(MODULES[cls.name]))

    def build(self) -> None:
        target, state = self.pop(2)
        if not isinstance(target, Module) or target.state is not None or not isinstance(state, dict):
            self.refuse(f"a BUILD of {describe(target)} from {describe(state)}")
        target.state = state
        self.stack.append(target)

    def call(self) -> None:
        function, args = self.pop(2)
        known = isinstance(function, _Word) and isinstance(args, tuple)
        called = CALLS.get(function.name) if known else None
        if called == "OrderedDict" and not args:
            self.stack.append({})
        elif called == "set" and len(args) == 1 and _is_empty(args[0], list):
            self.stack.append(())
        elif called == "tensor" and len(args) == 6 and _is_empty(args[5], dict):
            self.stack.append(self.view(*args[:4]))
        elif called == "parameter" and len(args) == 3 and isinstance(args[0], torch.Tensor):
            self.stack.append(args[0])
        else:
            self.refuse(f"a call of {describe(function)} with arguments that torch.save does not write")

    def storage(self) -> None:
        """`("storage", type, key, device, numel)` is the entry data/<key>; the device is ignored."""
        identity, = self.pop(1)
        if not isinstance(identity, tuple) or len(identity) != 5 or describe(identity[0]) != "'storage'":
            self.refuse(f"the persistent id {describe(identity)} is no storage")
        _, kind, key, _, numel = identity
        dtype = DTYPES.get(kind.name) if isinstance(kind, _Word) else None
        is_key = isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) is not None
        if dtype is None or not is_key or not _is_size(numel):
            self.refuse(f"a storage {describe(key)} of {describe(kind)} with {describe(numel)} elements")
        if key not in self.storages:
            size = numel * dtype.itemsize
            data = bytearray(self.read(f"data/{key}", size, size))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found = self.storages[key]
        if found.dtype != dtype or found.numel() != numel:
            self.refuse(f"storage {key} is claimed twice, with different types or sizes")
        self.stack.append(found)

    def view(self, storage: object, offset: object, shape: object, stride: object) -> torch.Tensor:
        """A tensor over a storage, once its last element is known to lie inside, and no element to repeat."""
        well_formed = isinstance(storage, torch.Tensor) and _is_size(offset) and _is_shape(shape)
        if not well_formed or not _is_shape(stride) or len(shape) != len(stride):
            self.refuse("a tensor with a malformed storage, offset, shape or stride")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 in shape or last >= storage.numel() or math.prod(shape) > storage.numel():
            self.refuse(f"a tensor of shape {shape}, stride {stride}, offset {offset} "
                        f"does not lie inside its storage of {storage.numel()} elements")
        return storage.as_strided(shape, stride, offset)


def _is_empty(value: object, kind: type) -> bool:
    return type(value) is kind and not value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= 4 and all(map(_is_size, value))


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {opcode[0]: operation for opcode, operation in {
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.BININT: lambda m: m.stack.append(m.number("<i")),
    pickle.BININT1: lambda m: m.stack.append(m.number("<B")),
    pickle.BININT2: lambda m: m.stack.append(m.number("<H")),
    pickle.BINUNICODE: lambda m: m.stack.append(m.text()),
    pickle.EMPTY_DICT: lambda m: m.stack.append({}),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.MARK: lambda m: m.stack.append(_MARK),
    pickle.TUPLE: lambda m: m.stack.append(tuple(m.above_mark())),
    pickle.TUPLE1: lambda m: m.stack.append(tuple(m.pop(1))),
    pickle.TUPLE2: lambda m: m.stack.append(tuple(m.pop(2))),
    pickle.TUPLE3: lambda m: m.stack.append(tuple(m.pop(3))),
    pickle.SETITEM: lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.above_mark()),
    pickle.BINPUT: lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    pickle.LONG_BINPUT: lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    pickle.BINGET: lambda m: m.stack.append(m.memo[m.number("<B")]),
    pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number("<I")]),
    pickle.GLOBAL: _Machine.word,
    pickle.NEWOBJ: _Machine.new,
    pickle.BUILD: _Machine.build,
    pickle.REDUCE: _Machine.call,
    pickle.BINPERSID: _Machine.storage,
}.items()}
