"""The machine that reads pickles runs nothing of them, whatever they hold."""

import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_files import HONEST, archive_of, dict_of, global_, number, refused, text, view

from lit_llama.model.files.pth.pickled import MAX_OPCODES

CANARY = "CANARY"
COMMAND = f"open({CANARY!r}, 'w')"
CALL = b"(" + text(COMMAND) + b"tR"
ATTACKS: dict[str, tuple[bytes, str]] = {
    "GLOBAL": (b"\x80\x02" + global_("builtins exec") + CALL + b".", "'builtins.exec'"),
    "GLOBAL 2": (b"\x80\x02" + global_("__builtin__ eval") + CALL + b".", "'__builtin__.eval'"),
    "global of torch": (b"\x80\x02" + global_("torch load") + CALL + b".", "'torch.load'"),
    "STACK_GLOBAL": (b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + CALL + b".", "'builtins.exec'"),
    "STACK_GLOBAL of numbers": (b"\x80\x04K\x01K\x02\x93.", "no text"),
    "dotted STACK_GLOBAL": (b"\x80\x04" + text("torch") + text("Size.mro") + b"\x93).", "'torch.Size.mro'"),
    "INST": (b"(" + text(COMMAND) + b"ibuiltins\nexec\n.", "opcode INST"),
    "OBJ": (b"(" + global_("collections OrderedDict") + text(COMMAND) + b"o.", "opcode OBJ"),
    "NEWOBJ": (b"\x80\x02" + global_("collections OrderedDict") + b")\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04" + global_("collections OrderedDict") + b")}\x92.", "opcode NEWOBJ_EX"),
    "REDUCE of text": (b"\x80\x02" + text("exec") + CALL + b".", "call of a str"),
    "REDUCE of a storage": (b"\x80\x02" + global_("torch FloatStorage") + b")R.", "call of torch.FloatStorage"),
    "REDUCE without a tuple": (b"\x80\x02" + global_("torch Size") + b"NR.", "call of a global"),
    "BUILD of a dict": (b"\x80\x02}}" + text("_metadata") + b"Nsb.", "attributes for a dict"),
    "BUILD of a tensor": (dict_of(text("a"), view() + b"}b"), "attributes for a tensor"),
    "BUILD of a global": (b"\x80\x02" + global_("torch Size") + b"}b.", "attributes for a global"),
    "BUILD of other attributes": (
        b"\x80\x02" + global_("collections OrderedDict") + b")R}" + text("__class__") + b"Nsb.",
        "attributes other than _metadata",
    ),
    "BUILD with a list": (b"\x80\x02" + global_("collections OrderedDict") + b")R]b.", "attributes other"),
    "SETITEM on a tensor": (b"\x80\x02" + view() + b"K\x00K\x01s.", "attributes for a tensor"),
    "SETITEM on a list": (b"\x80\x02]K\x00K\x01s.", "attributes for a list"),
    "APPEND to a tensor": (b"\x80\x02" + view() + b"K\x00a.", "attributes for a tensor"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "PERSID": (b"P0\n.", "opcode PERSID"),
    "BINPERSID of text": (b"\x80\x02" + text("x") + b"Q.", "no storage"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "BYTEARRAY8": (b"\x80\x05\x96" + struct.pack("<Q", 2) + b"ab.", "opcode BYTEARRAY8"),
    "EMPTY_SET": (b"\x80\x04\x8f.", "opcode EMPTY_SET"),
    "DUP": (b"\x80\x02}2.", "opcode DUP"),
    "nothing": (b"", "no readable pickle"),
    "no end": (HONEST[:-1], "no readable pickle"),
    "two values": (b"\x80\x02NN.", "more or less than one value"),
    "open mark": (b"\x80\x02(}.", "more or less than one value"),
    "no value": (b"\x80\x02.", "more or less than one value"),
    "something after the end": (HONEST + global_("builtins exec") + CALL + b".", "after the end"),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "unknown opcode": (b"\x80\x02\xff.", "no readable pickle"),
    "no operand": (b"\x80\x02s.", "without its operands"),
    "no mark": (b"\x80\x02t.", "without its mark"),
    "below a mark": (b"\x80\x02NN(\x86.", "without its operands"),
    "half a pair": (b"\x80\x02}(Nu.", "a key without a value"),
    "unknown memo": (b"\x80\x02h\x05.", "no readable pickle"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.", "no readable pickle"),
    "negative LONG4": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b".", "no readable pickle"),
    "long number": (b"L" + b"9" * 5000 + b"L\n.", "no readable pickle"),
    "nested pickle": (b"\x80\x03C" + bytes([len(b"cos\nsystem\n")]) + b"cos\nsystem\n.", "holds a bytes"),
}


@pytest.mark.parametrize(("data", "message"), ATTACKS.values(), ids=ATTACKS)
def test_nothing_of_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    """Catches a name that is imported, a call that is made, and an opcode that is let through."""
    monkeypatch.chdir(tmp_path)
    refused(archive_of(tmp_path / "a.pth", data), message, loops=12)
    assert not Path(CANARY).exists()


class Attack:
    """What a malicious author writes: any call."""

    def __reduce__(self) -> Any:
        return exec, (COMMAND,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_inside_an_honest_file_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, legacy: bool
) -> None:
    """Catches a container or protocol that goes around the machine; the attack itself works."""
    monkeypatch.chdir(tmp_path)
    content = {"a": torch.ones(2), "b": Attack()} if protocol else {"b": Attack()}
    torch.save(content, "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "a.pth")
    assert not Path(CANARY).exists()
    pickle.loads(pickle.dumps(Attack(), protocol))
    assert Path(CANARY).exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"]" * 10_000_000 + b".",
        b"\x80\x02" + b"0" * 10_000_000 + b".",
        b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(100_000)) + b".",
        b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(1, 200_000)) + b".",
        b"\x80\x02N" + b"q\x01h\x01\x86" * 100_000 + b"q\x01}h\x01Ns.",
        b"\x80\x02}h\x00" + b"N" * (MAX_OPCODES - 10) + b".",
        b"\x80\x02" + b"(" * 400_000 + b"l" * 90_000 + b".",
        b"\x80\x02}" + b"}" * 100_000 + (b"K\x01N" + b"s") * 50_000 + b".",
        b"\x80\x02N" + b"\x85" * 400_000 + b".",
        b"\x80\x02N" + b"\x85" * 100_000 + b"q\x00h\x00h\x00\x86R.",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b"\x8a\xff" + b"\xff" * 255 + b"".join(b"q\x00h\x00\x86" for _ in range(10)) + b".",
        dict_of(text("a"), view((0xFF << 2000,) * 20_000, (1,) * 20_000)),
        dict_of(text("a"), view((1,) * 100_000, (1,) * 100_000)),
        dict_of(*[number(i * (2**61 - 1)) + b"N" for i in range(100_000)], text("a"), view()) + b"!",
    ],
)
def test_no_pickle_takes_long_or_much(tmp_path: Path, data: bytes) -> None:
    """Catches recursion, a memo whose size the file chooses, numbers chosen to collide, and an endless loop.

    The bound is the whole process's: what is freed in between counts too."""
    path = archive_of(tmp_path / "a.pth", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, loops=80)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
