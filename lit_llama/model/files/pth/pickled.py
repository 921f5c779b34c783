"""Pickle of a state dict, read without running it.

A small machine knows the opcodes and names that torch.save needs for tensors, and refuses every other. It builds the
inert values below: nothing is imported or called, and nothing is hashed, compared or walked but text and small numbers,
so that no input can cost more than its opcodes.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_llama.errors import CheckpointError

MAX_BYTES = 64 * 2**20
MAX_OPCODES = 500_000
"""A tensor takes about 30; the largest LLaMA models have about a thousand."""


@dataclass(frozen=True, eq=False, repr=False)
class Global:
    """A name, never what it stands for."""

    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """A record of numbers in the archive."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A tensor: some numbers of a storage; the integers are not checked yet."""

    storage: Storage
    offset: Any
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Items:
    """Pairs that were put into a dict."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


class OrderedItems(Items):
    """An OrderedDict; state dicts carry the attribute `_metadata`."""


def kind_of(value: Any) -> str:
    """Name the kind of a value of a pickle, for messages."""
    words = {Items: "dict", OrderedItems: "OrderedDict", View: "tensor", Storage: "storage", Global: "global"}
    return words.get(type(value), type(value).__name__)


STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ShortStorage": torch.int16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
}
_DTYPES = {f"torch {str(dtype).removeprefix('torch.')}" for dtype in STORAGES.values()}
_FUNCTIONS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
}
_GLOBALS = STORAGES.keys() | _DTYPES | _FUNCTIONS

_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
_LITERALS |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_FRESH = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": Items}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class _Refused(ValueError):
    """Something that no honest file of weights holds; the position is added where it is caught."""


def read_pickle(data: bytes, where: str) -> Any:
    """Read the inert value of a pickle.

    Args:
        data: The pickle.
        where: What it is, for messages.

    Raises:
        CheckpointError: It holds anything but tensors and plain values, or is damaged.
    """
    machine, position = _Machine(), 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(data)):
            position = at or 0
            if count == MAX_OPCODES:
                raise _Refused(f"more than {MAX_OPCODES} opcodes")
            machine.step(opcode.name, argument)
        if position + 1 != len(data):
            raise _Refused(f"{len(data) - position - 1} bytes after the end of the pickle")
        return machine.result()
    except _Refused as error:
        raise CheckpointError(
            f"{where} holds {error} (byte {position}); expected a dict of tensors and nothing that could run code; "
            "get the weights as .safetensors"
        ) from error
    except (ValueError, LookupError) as error:
        raise CheckpointError(
            f"{where} is no readable pickle: {str(error)[:200]} (byte {position}); download the file again"
        ) from error


class _Machine:
    """Stack, marks and memo of the pickle protocols 0 to 5."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _PUTS:
            self._remember(argument)
        elif name in _GETS:
            self.stack.append(self.memo[self._index(argument)])
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            self.stack.append(_FRESH[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            self._rare(name, argument)

    def _rare(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "TUPLE" | "LIST":
                values = self._marked()  # puts the stack below the mark back
                self.stack.append(tuple(values) if name == "TUPLE" else values)
            case "DICT":
                values = self._marked()
                self.stack.append(Items(_pairs(values)))
            case "APPEND" | "APPENDS":
                values = self._pop(1) if name == "APPEND" else self._marked()
                self._target(list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self._pop(2) if name == "SETITEM" else self._marked()
                self._target(Items).pairs.extend(_pairs(values))
            case "GLOBAL":
                self.stack.append(_resolve(argument))
            case "STACK_GLOBAL":
                self.stack.append(_resolve(" ".join(str(part)[:100] for part in _texts(self._pop(2)))))
            case "REDUCE":
                self.stack.append(_call(*self._pop(2)))
            case "BINPERSID":
                self.stack.append(_storage(*self._pop(1)))
            case "BUILD":
                self._build(*self._pop(1))
            case "MEMOIZE":
                self._remember(len(self.memo))
            case "PROTO" if argument > 5:
                raise _Refused(f"pickle protocol {argument}")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise _Refused(f"the opcode {name}")

    def result(self) -> Any:
        """The one value that is left."""
        if self.outer or len(self.stack) != 1:
            raise _Refused("more or less than one value")
        return self.stack[0]

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise _Refused("an opcode without its operands")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        if not self.outer:
            raise _Refused("an opcode without its mark")
        taken, self.stack = self.stack, self.outer.pop()
        return taken

    def _index(self, argument: int) -> int:
        # Numbers beyond 64 bits can be chosen to have equal hashes, which would make the memo as slow as a list.
        if not 0 <= argument < MAX_OPCODES:
            raise _Refused("a memo index out of bounds")
        return argument

    def _remember(self, argument: int) -> None:
        if not self.stack:
            raise _Refused("an opcode without its operands")
        self.memo[self._index(argument)] = self.stack[-1]

    def _target(self, kind: type) -> Any:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, kind):
            raise _Refused(f"items or attributes for a {kind_of(target)}")
        return target

    def _build(self, state: Any) -> None:
        self._target(OrderedItems)
        if not isinstance(state, Items) or not all(key == "_metadata" for key, _ in state.pairs):
            raise _Refused("attributes other than _metadata")


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    if len(values) % 2:
        raise _Refused("a key without a value")
    return list(zip(values[::2], values[1::2], strict=True))


def _texts(values: list[Any]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise _Refused("a global whose name is no text")
    return values


def _resolve(name: str) -> Global:
    if name not in _GLOBALS:
        raise _Refused(f"the global {name.replace(' ', '.')[:200]!r}")
    return Global(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise _Refused(f"a call of a {kind_of(function)}")
    match function.name.split(" ")[1], arguments:
        case "OrderedDict", ():
            return OrderedItems()
        case "_rebuild_tensor", (Storage() as storage, offset, tuple(shape), tuple(stride)):
            return View(storage, offset, shape, stride)
        # A seventh argument would say that the values are stored negated or conjugated.
        case "_rebuild_tensor_v2", (Storage() as storage, offset, tuple(shape), tuple(stride), bool(), Items()):
            return View(storage, offset, shape, stride)
        case "_rebuild_parameter", (View() as view, bool(), Items()):
            return view
        case "Size" | "device", _:
            return None
        case _:
            raise _Refused(f"a call of {function.name.replace(' ', '.')} with unknown arguments")


def _storage(value: Any) -> Storage:
    match value:
        case ("storage", Global(name=name), str(key), str(), int(elements)) if (
            name in STORAGES and 0 <= elements < 2**63
        ):
            return Storage(STORAGES[name], key, elements)
        case _:
            raise _Refused("a reference that is no storage of numbers")
