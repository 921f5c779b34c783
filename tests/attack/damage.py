"""One flipped bit, or a file of another folder with all its times: whoever reads the folder names the file."""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from world import Result, World

from lit_llama.errors import IntegrityError, UserError
from lit_llama.folder.manifest import MANIFEST, read_manifest
from lit_llama.generate.llm import open_folder
from lit_llama.train.inputs import read_inputs

Read = Callable[[], object]


def flips(world: World, trials: int, seed: int) -> Result:
    """Flip bits in all files of folders that the commands wrote, and in the weights under an adapter."""
    draw, result = random.Random(seed), Result("flips")
    targets = [(path, read) for folder, read in _readers(world) for path in _files(folder)]
    targets += [(world.base / "model.safetensors", lambda: open_folder(world.adapter))]
    for _ in range(trials):
        path, read = draw.choice(targets)
        data = path.read_bytes()
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        with _damaged(path):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with path.open("r+b") as file:
                file.write(changed)
            judge(result, path, read, f"bit {bit} of byte {place}")
    return result


def swaps(world: World, trials: int, seed: int) -> Result:
    """Put whole files in the place of others, as a slip of the hand does."""
    draw, result = random.Random(seed), Result("swaps")
    adapter, merged, data = (lambda: open_folder(world.adapter)), (lambda: open_folder(world.merged)), _data(world)
    named = ("adapter_model.safetensors", "model.safetensors", "meta.json", "data-00000-of-00001.arrow")
    arrow = named[3]
    pairs: list[tuple[Path, Path, Read]] = [
        (world.adapter / named[0], world.other_adapter / named[0], adapter),
        (world.merged / named[1], world.other_merged / named[1], merged),
        (world.merged / named[1], world.converted / named[1], merged),
        (world.merged / "config.json", world.converted / "config.json", merged),
        (world.adapter / named[2], world.other_adapter / named[2], adapter),
        (world.data / "test" / arrow, world.data / "train" / arrow, data),
        (world.data / "train" / arrow, world.data / "test" / arrow, data),
        (world.data / "chat_template.jinja", world.data / "meta.json", data),
        (world.base / named[1], world.merged / named[1], adapter),
    ]
    for _ in range(trials):
        path, other, read = draw.choice(pairs)
        if path.read_bytes() == other.read_bytes():
            result.count("the same bytes")
            continue
        with _damaged(path):
            times = path.stat().st_atime_ns, path.stat().st_mtime_ns
            part = path.with_name("part")
            shutil.copyfile(other, part)
            os.utime(part, ns=times)
            part.replace(path)
            judge(result, path, read, f"{other.parent.name}/{other.name} in its place")
    return result


def _readers(world: World) -> Iterator[tuple[Path, Read]]:
    yield world.data, _data(world)
    for folder in (world.adapter, world.merged, world.converted):
        yield folder, lambda folder=folder: open_folder(folder)


def _data(world: World) -> Read:
    return lambda: read_inputs(world.base, world.data)


def _files(folder: Path) -> list[Path]:
    """All that the manifest names, and itself; an empty file has no bit to flip."""
    paths = [folder / name for name in read_manifest(folder)] + [folder / MANIFEST]
    return [path for path in paths if path.stat().st_size]


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Bring a file back as it was; within, each change of it gets the time that it had."""
    data, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=times)


def judge(result: Result, path: Path, read: Read, what: str) -> None:
    """Count what reading a damaged folder comes to: an error of ours that names the file, or nothing good."""
    result.trials += 1
    where = f"{path.parent.name}/{path.name}, {what}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read()
    except IntegrityError as error:
        named = path.name in str(error) or path.name == MANIFEST or "not the base" in str(error)
        result.count("found, status 6" if named else "found, not named")
        if not named:
            result.wrong.append(f"{where}: {error}")
    except UserError as error:
        result.count(f"found, status {error.exit_status}")
    except Exception as error:
        result.count("traceback")
        result.wrong.append(f"{where}: {error!r}")
    else:
        result.count("accepted")
        result.wrong.append(f"{where}: accepted")
