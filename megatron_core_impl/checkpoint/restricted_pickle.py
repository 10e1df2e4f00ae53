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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 200_000_000  # a checkpoint's is a few KB per layer
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

_CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (),
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
        return _interpret(data)
    except RefusedPickle:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        raise RefusedPickle(f"is malformed ({type(error).__name__}: {str(error)[:100]})") from None


def _interpret(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # how much was on the stack
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        found = stack[at:]
        del stack[at:]
        return found

    argument: Any
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(_popped(stack, count))]
        elif name == "APPEND":
            value = stack.pop()
            _expect(stack[-1], list).append(value)
        elif name == "APPENDS":
            values = since_mark()
            _expect(stack[-1], list).extend(values)
        elif name == "SETITEM":
            _set_items(stack, _popped(stack, 2, remove=True))
        elif name == "SETITEMS":
            _set_items(stack, since_mark())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(*_popped(stack, 2, remove=True)))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = _popped(stack, 2, remove=True)
            stack.append(_made(_expect(function, _Name), _expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "STOP":
            (result,) = stack
            return result
        else:
            raise RefusedPickle(f"uses {name} at byte {position:,}, which no checkpoint needs")
    raise RefusedPickle("is malformed: it has no end")


def _named(module: object, name: object) -> _Name:
    """A name that a checkpoint may hold."""
    found = _Name(_expect(module, str), _expect(name, str))
    key = (found.module, found.name)
    is_storage = found.module in ("torch", "torch.cuda") and found.name in STORAGES
    is_dtype = found.module == "torch" and found.name in _DTYPES
    is_enum = ENUMS.fullmatch(found.module) is not None and found.name.isidentifier()
    if key in _OF_TORCH or key in _IDLE or is_storage or is_dtype or is_enum:
        return found
    raise RefusedPickle(
        f"names {found.module[:100]}.{found.name[:100]}, which is none of the tensors, arguments and enums of a checkpoint. "
        "Nothing in it was run"
    )


def _made(function: _Name, arguments: tuple[Any, ...]) -> Any:
    """What is pickled as a call: the record of it."""
    match (function.module, function.name):
        case "collections", "OrderedDict":
            pairs = [_expect(pair, list, tuple) for pair in (_expect(arguments[0], list, tuple) if arguments else ())]
            made: dict[Any, Any] = {}
            _set_items([made], [value for key, item in pairs for value in (key, item)])
            return made
        case "argparse", "Namespace" if not arguments:
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


def _build(target: Any, state: Any) -> None:
    """Give something its state: arguments theirs. An OrderedDict's attributes, and the state of what is idle, are read over."""
    if isinstance(target, dict):
        attributes = _expect(state, dict)
        if not all(isinstance(name, str) for name in attributes):
            raise RefusedPickle("gives arguments names that are no text")
        if attributes.keys() != {"_metadata"}:  # that of a module's state: versions of its parts
            target.update(attributes)
    elif not isinstance(target, Idle):
        raise RefusedPickle(f"sets the state of a {type(target).__name__.strip('_')}")


def _storage(told: Any) -> Storage:
    kind, storage, key, _, size = _expect(told, tuple)[:5]
    name = _expect(storage, _Name)
    if kind != "storage" or name.name not in STORAGES:
        raise RefusedPickle(f"refers to {name}, which is no storage")
    return Storage(_expect(key, str), STORAGES[name.name], _counts((size,))[0])


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    record = TensorRecord(_expect(storage, Storage), _counts((offset,))[0], _counts(shape), _counts(stride))
    last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
    if 0 not in record.shape and last >= record.storage.size:
        raise RefusedPickle(f"has a tensor that reaches beyond its storage {record.storage.key[:20]}")
    return record


def _counts(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 2**63 for value in _expect(values, tuple)):
        raise RefusedPickle("has a tensor whose sizes are no counts")
    return tuple(values)


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target: dict[Any, Any] = _expect(stack[-1], dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise RefusedPickle(f"has a dictionary with a {type(key).__name__} for a key")
        target[key] = value


def _popped(stack: list[Any], count: int, *, remove: bool = False) -> list[Any]:
    if len(stack) < count:
        raise RefusedPickle("is malformed: its stack is empty")
    found = stack[-count:]
    if remove:
        del stack[-count:]
    return found


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
