"""State folders: all that a run needs to go on, written between two steps.

OUT/states/step-000123/ holds the trained weights in the layout of the result, optim.safetensors, state.json, and
SHA256SUMS over them. It is written aside, synced to the disk and renamed, so that it is there whole or not at all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_llama.errors import IntegrityError, ResourceError, UserError
from lit_llama.folder.manifest import MANIFEST, read_manifest, sha256_file, write_manifest
from lit_llama.folder.place import remove_own
from lit_llama.folder.publish import check_space, publish, sync, write_json
from lit_llama.objects import check_form, read_object
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.wording import param

STATES_DIR, STATE_FILE = "states", "state.json"
SETTING = "--"
"""Mark of settings in a state's record of what it was made of."""
KEPT = 2
"""States that stay, the newest among them."""
_FORM: Mapping[str, Any] = {
    "progress": {"step": int, "trained_tokens": int, "tokens": int, "skipped": int, "losses": list, "begun": bool},
    "best": {"loss": float, "step": int, "waited": int},
    "scaler": dict,
    "identity": dict,
    "environment": dict,
}
"""Of state.json: all of it has to be there but the lowest loss, which may not have been measured."""
_NAME = re.compile(r"step-(\d{6,})")


def save_state(states: Path, step: int, write: Callable[[Path], Mapping[str, Any]], size: int) -> Path:
    """Write a state, read it back, and only then remove those that are too many.

    Args:
        states: The folder of all states of a run, which nobody else writes to.
        step: Optimizer steps done.
        write: Writes everything but state.json into the folder it is given, and gives the contents of that.
        size: Bytes that `write` will write, about.

    Raises:
        ResourceError: The disk is full or fails. The states before stay, and nothing half written is left.
    """
    folder = states / f"step-{step:06d}"
    try:
        states.mkdir(exist_ok=True)
        sync(states.parent)
        clear(states)
        check_space(states, size)
        with publish(folder, MANIFEST) as part:
            write_json(part / STATE_FILE, write(part))
            write_manifest(part, {})
    except (OSError, SafetensorError, ResourceError) as error:
        kept = found[-1] if (found := find_states(states)) else None
        stays = f"{kept} stays: make room and continue it" if kept else "there is no state before it"
        raise ResourceError(f"{folder} cannot be written: {error}; {stays}") from error
    read_state(folder)
    for old in find_states(states)[:-KEPT]:
        set_aside(old)
    clear(states)
    return folder


def find_states(states: Path) -> list[Path]:
    """Find the state folders of a run, oldest first, whole or not."""
    found = states.iterdir() if states.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in the name of a state folder."""
    return int(folder.name.removeprefix("step-"))


def set_aside(folder: Path) -> None:
    """Take a state out of the list, in one step, so that none is ever half removed; `save_state` removes it."""
    old = folder.with_name(f".{folder.name}.old")
    remove_own(old)  # of a run that was killed before it came to that
    folder.rename(old)


def clear(states: Path) -> None:
    """Remove what was set aside, and what a killed process had begun, from a folder that nobody else writes to."""
    for path in states.glob(".step-*"):
        remove_own(path)


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a state that is proven to be as it was written.

    Raises:
        IntegrityError: A file is missing or has other bytes.
    """
    sums = read_manifest(folder)
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    if unnamed := (there | {STATE_FILE, OPTIMIZER_FILE}) - set(sums):
        raise IntegrityError(f"{folder / MANIFEST} is damaged: it does not name {min(unnamed)}")
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing")
        if sha256_file(path) != digest:
            raise IntegrityError(f"{path} is damaged: its sha256 is not that in {MANIFEST}")
    return read_object(folder / STATE_FILE, IntegrityError)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `read_state` gives, proven to say all that a run goes on with.

    Raises:
        IntegrityError: A file is missing or has other bytes, or state.json is of another form.
    """
    record = read_state(folder)
    if missing := [name for name in _FORM if record.get(name) is None]:
        raise IntegrityError(f"{folder / STATE_FILE} has no {', '.join(missing)}")
    check_form(record, _FORM, str(folder / STATE_FILE), IntegrityError)
    for name in ("progress", "best"):
        if (found := set(record[name])) != _FORM[name].keys():
            names = ", ".join(_FORM[name])
            raise IntegrityError(f"{folder / STATE_FILE}: {name} has {', '.join(sorted(found))}, expected {names}")
        if missing := [key for key, value in record[name].items() if value is None and key != "loss"]:
            raise IntegrityError(f"{folder / STATE_FILE}: {name} has no {missing[0]}")
    return record


def choose_state(
    states: list[Path], resume: str | Path, out_dir: Path, continued: Callable[[Path], str]
) -> Path | None:
    """Choose the state to go on from, proven whole; None if there is none yet.

    Args:
        states: Those of the run, oldest first.
        resume: "auto" for the newest state, or one of its state folders by its path.
        out_dir: The folder of the run.
        continued: Names the call that continues the run from a state.

    Raises:
        IntegrityError: It is damaged. An older one is named, but used only when it is asked for by its path: the
            steps since then would be lost.
        UserError: The path is no state of this run.
    """
    if resume == "auto":
        if not states:
            return None
        chosen = states[-1]
    else:
        chosen = Path(resume)
        if chosen.resolve() not in [path.resolve() for path in states]:
            there = ", ".join(map(str, states)) or "none"
            raise UserError(f"is no state of {out_dir}", parameter="resume", value=resume, remedy=f"there are: {there}")
        chosen = next(path for path in states if path.resolve() == chosen.resolve())
    try:
        read_state(chosen)
    except IntegrityError as error:
        whole = [path for path in states if path != chosen and is_whole(path)]
        way = (
            f"bring it back, or go on from step {step_of(whole[-1])} and lose what came after: {continued(whole[-1])}"
            if whole
            else f"no other state is whole: bring it back, or begin again with another {param('out_dir')}"
        )
        raise IntegrityError(f"{error}; {way}") from error
    return chosen


def is_whole(folder: Path) -> bool:
    """Whether every file of a state is as it was written."""
    try:
        read_state(folder)
    except IntegrityError:
        return False
    return True


def check_same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()) -> None:
    """Refuse to go on with other data, base, tokenizer or settings than those of the state.

    Args:
        folder: The state.
        was: What its state.json records, by name.
        now: The same of the run that is to go on.
        free: Names that may differ.

    Raises:
        UserError: They differ; the message lists every difference.
    """
    absent = object()
    differences = [
        f"{_named(name)} was {_show(was.get(name, absent), absent)}, is {_show(now.get(name, absent), absent)}"
        for name in dict.fromkeys([*was, *now])
        if name not in free and was.get(name, absent) != now.get(name, absent)
    ]
    if differences:
        raise UserError(
            f"{folder} belongs to another run: {'; '.join(differences)}. Continue with what it began with, or begin "
            f"anew in another {param('out_dir')}"
        )


def _named(recorded: str) -> str:
    """What a state records: a setting, or something else that it was made of."""
    return param(recorded.removeprefix(SETTING)) if recorded.startswith(SETTING) else recorded


def _show(value: Any, absent: object) -> str:
    return "not there" if value is absent else str(value)
