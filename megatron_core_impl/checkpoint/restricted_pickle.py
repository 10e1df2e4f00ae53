"""The pickles in PyTorch's files, read by an interpreter that can make plain data and nothing else. No torch in here.

Python's own unpickler calls what a file names. This one calls nothing that a file names. It knows by name what a checkpoint
needs: tensors, which become records of where their numbers lie; an `argparse.Namespace`, which becomes a dictionary;
the enums of the reference's modules, which become their name and value; and what the states of random number generators are
made of, which becomes an empty mark. Every other name is an error as soon as it is read, and so is every way of using one of
these that is not the way in which it was pickled. No class is looked up, no module imported, no attribute set.

The opcodes: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py. Its `genops` splits the bytes into them.
"""

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 8_000_000  # a checkpoint's is a few KB per layer: seconds and a few hundred MB, whatever is in it
MAX_STACK = 10_000  # a list is written a thousand items at a time, and a tuple at once
MAX_NAME, MAX_DIMS = 100, 64
ENUMS = re.compile(r"megatron(\.\w+)*\.enums")

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
_DTYPES = {*STORAGES.values(), "half", "float", "double"}
_OF_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("argparse", "Namespace"),
}  # fmt: skip
# Of the states of random number generators: read over
_IDLE = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("torch", "device"), ("torch", "Size"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}  # fmt: skip

_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip


class RefusedPickle(ValueError):
    """A pickle that is malformed, or names something that no checkpoint needs. Nothing of it was run."""


@dataclass(frozen=True)
class Storage:
    """Numbers in a file of their own inside the archive."""

    key: str
    dtype: str
    size: int  # how many numbers


@dataclass(frozen=True)
class TensorRecord:
    """Where the numbers of a tensor lie."""

    storage: Storage
    offset: int  # in numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As torch names it: float32."""
        return self.storage.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie row by row, one after the other."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def last(self) -> int:
        """The last number of the storage that it reaches."""
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def overlaps(self) -> bool:
        """Whether two of its numbers may be the same one of the storage. Not where each dim steps over all smaller ones."""
        reached = 0
        for step, size in sorted((step, size) for size, step in zip(self.shape, self.stride, strict=True) if size != 1):
            if step <= reached and 0 not in self.shape:
                return True
            reached += (size - 1) * step
        return False


@dataclass(frozen=True)
class EnumMember:
    """A member of one of the reference's enums, by its value."""

    enum: str
    value: int | str


class Idle:
    """What stands for something that was read over."""


@dataclass(frozen=True)
class _Name:
    """Something that the pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def load(data: bytes) -> Any:
    """What a pickle holds: None, bool, int, float, str, bytes, tuple, list, dict, and the classes above.

    Raises:
        RefusedPickle: it is malformed, or names something else; the message says what.
    """
    if len(data) > MAX_BYTES:
        raise RefusedPickle(f"is larger than {MAX_BYTES:,} bytes")
    try:
        return _Machine(data).run(data)
    except RefusedPickle:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        raise RefusedPickle(f"is malformed ({type(error).__name__}: {str(error)[:100]})") from None


class _Machine:
    """What the opcodes work on. Nothing here looks into a value that was made: no comparison, no hash, no text of it."""

    def __init__(self, data: bytes) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # how much was on the stack
        self.memo: dict[int, Any] = {}
        self.copies_left = len(data)  # of entries of one dictionary into another, each of which a pickle has written once

    def run(self, data: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            if (do := _OPCODES.get(opcode.name)) is None:
                raise RefusedPickle(f"uses {opcode.name} at byte {position:,}, which no checkpoint needs")
            do(self, argument)
            if len(self.stack) > MAX_STACK:
                raise RefusedPickle(f"nests or lists more than {MAX_STACK:,} things at byte {position:,}")
        raise RefusedPickle("is malformed: it has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise RefusedPickle("is malformed: its stack is empty")
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def append(self, values: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(values)

    def set_items(self, items: list[Any]) -> None:
        target: dict[Any, Any] = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nor a number that an author could choose for its hash
            if not isinstance(key, str | None) and not (isinstance(key, int) and abs(key) < 2**31):
                raise RefusedPickle(f"has a dictionary with a {type(key).__name__} for a key")
            target[key] = value

    def remember(self, at: int) -> None:
        self.memo[at] = self.stack[-1]

    def make(self) -> None:
        function, arguments = self.pop(2)
        self.push(_made(_expect(function, _Name), _expect(arguments, tuple)))

    def build(self) -> None:
        """Give something its state: arguments theirs. Attributes of an OrderedDict, and what is idle, are read over."""
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, dict):
            attributes = _expect(state, dict)
            self.copies_left -= len(attributes)
            if self.copies_left < 0:
                raise RefusedPickle("gives the same state again and again")
            if not all(isinstance(name, str) for name in attributes):
                raise RefusedPickle("gives arguments names that are no text")
            if attributes.keys() != {"_metadata"}:  # that of a module's state: versions of its parts
                target.update(attributes)
        elif not isinstance(target, Idle):
            raise RefusedPickle(f"sets the state of a {type(target).__name__.strip('_')}")


_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda _, __: None),
    **dict.fromkeys(_LITERALS, lambda machine, argument: machine.push(argument)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.remember(at)),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": lambda machine, names: machine.push(_named(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(_named(*machine.pop(2))),
    "BINPERSID": lambda machine, _: machine.push(_storage(*machine.pop(1))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.make()),
    "BUILD": lambda machine, _: machine.build(),
}


def _named(module: object, name: object) -> _Name:
    """A name that a checkpoint may hold."""
    found = _Name(_expect(module, str)[: MAX_NAME + 1], _expect(name, str)[: MAX_NAME + 1])
    key = (found.module, found.name)
    is_storage = found.module in ("torch", "torch.cuda") and found.name in STORAGES
    is_dtype = found.module == "torch" and found.name in _DTYPES
    is_enum = ENUMS.fullmatch(found.module) is not None and found.name.isidentifier()
    if max(map(len, key)) <= MAX_NAME and (key in _OF_TORCH or key in _IDLE or is_storage or is_dtype or is_enum):
        return found
    raise RefusedPickle(
        f"names {found.module}.{found.name}, which is none of the tensors, arguments and enums of a checkpoint. "
        "Nothing in it was run"
    )


def _made(function: _Name, arguments: tuple[Any, ...]) -> Any:
    """What is pickled as a call: the record of it."""
    match (function.module, function.name):
        case ("collections", "OrderedDict") | ("argparse", "Namespace") if not arguments:
            return {}
        case "torch._utils", "_rebuild_tensor_v2":
            return _tensor(*arguments[:4])
        case "torch._utils", "_rebuild_parameter":
            return _expect(arguments[0], TensorRecord)
    if (function.module, function.name) in _IDLE:
        return Idle()
    if ENUMS.fullmatch(function.module) and len(arguments) == 1:
        return EnumMember(str(function), _expect(arguments[0], int, str))
    raise RefusedPickle(f"calls {function} in a way in which no checkpoint is written")


def _storage(told: Any) -> Storage:
    kind, storage, key, _, size = _expect(told, tuple)[:5]
    name = _expect(storage, _Name)
    if kind != "storage" or name.name not in STORAGES:
        raise RefusedPickle(f"refers to {name}, which is no storage")
    return Storage(_expect(key, str), STORAGES[name.name], _counts((size,))[0])


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    record = TensorRecord(_expect(storage, Storage), _counts((offset,))[0], _counts(shape), _counts(stride))
    if len(record.shape) != len(record.stride):
        raise RefusedPickle("has a tensor with more sizes than strides, or fewer")
    if 0 not in record.shape and record.last >= record.storage.size:
        raise RefusedPickle(f"has a tensor that reaches beyond its storage {record.storage.key[:20]}")
    return record


def _counts(values: Any) -> tuple[int, ...]:
    if len(_expect(values, tuple)) > MAX_DIMS or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise RefusedPickle("has a tensor whose sizes are no counts")
    return tuple(values)


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__.strip("_") for kind in kinds)
        raise RefusedPickle(f"has a {type(value).__name__.strip('_')} where a {wanted} belongs")
    return value


def entries(state: Any, where: str) -> Mapping[str, Any]:
    """A dictionary with names for keys, as every level of a checkpoint is. `where` names the level in the message."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise RefusedPickle(f"has no dictionary by name at {where}")
    return state
