"""Paths that are no checkpoint folders: what they are instead, and the way out. Imports no torch."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.publish import MARKERS, FolderKind, articled
from lit_llama.wording import call, param, params

MODEL: tuple[FolderKind, ...] = ("model",)
ADAPTER: tuple[FolderKind, ...] = ("adapter",)
DATA: tuple[FolderKind, ...] = ("data folder",)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LOCAL = ("checkpoints", "data", "model", "models", "out", "output", "outputs")
"""First parts of paths, which owners on the Hub are not called."""
_MODEL_FILE, _ADAPTER_FILE = MARKERS["model"], MARKERS["adapter"]
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_QUANTISED = re.compile(
    r"-(?:unsloth-)?bnb-[48]bit|-[48]bit|-(?:gptq|awq|hqq|aqlm|eetq|nf4|mlx)(?:[-.](?:int)?\d(?:bit)?)?"
    r"|-(?:gptq-)?int[48]|-fp8(?:-dynamic|-kv)?|-quantized\.w\d+a\d+|-gguf",
    re.IGNORECASE,
)
_MAKERS: dict[FolderKind, str] = {"model": "download", "adapter": "finetune", "data folder": "prepare"}
_TORCHTUNE = re.compile(r"(?:adapter|hf_model_\d+|meta_model)_\d+\.pt")
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}


def repository(name: str) -> str | None:
    """Return a name if it can be one of a repository on the Hub, OWNER/NAME, and is no path of a folder here."""
    owner = name.partition("/")[0]
    local = owner in _LOCAL or ".." in name or Path(owner).is_dir()
    return name if _REPOSITORY.fullmatch(name) and not local else None


def of_sixteen_bits(name: str) -> str | None:
    """Return the name of the model that a quantised copy of this name was made from, as far as names tell; None if they
    do not.
    """
    plain = _QUANTISED.sub("", name)
    return plain if plain != name else None


def describe_quantization(raw: Mapping[str, Any], folder: Path) -> str:
    """Describe the quantization_config of a model, and the way out.

    Args:
        raw: Contents of config.json.
        folder: The folder that it stands in.
    """
    if holds_fp8(raw):
        return (
            "the weights are 8-bit floats (FP8) with scales: turn them into bfloat16 once, with "
            f"{call('convert', source=folder, destination_path=f'{folder}-bf16')}"
        )
    settings = raw.get("quantization_config") or raw.get("compression_config")
    settings = settings if isinstance(settings, Mapping) else {}
    unnamed = "bitsandbytes" if _bnb_bits(settings) else "a method that is not named"
    kind = str(settings.get("quant_method") or unnamed)
    bits = settings.get("bits", settings.get("w_bit")) or _bnb_bits(settings)
    said = f"{_METHODS.get(kind, kind)}{f' in {bits} bits' if isinstance(bits, int) else ''}"
    origin = raw.get("_name_or_path")
    known = (of_sixteen_bits(text) for text in (origin, folder.name) if isinstance(text, str))
    plain = next((text for text in known if text), None)
    which = f", probably {plain}" if plain else ""
    command = call("download", repo_id=repository(plain or "") or "OWNER/NAME")
    return (
        f"the weights are quantised with {said}, which is not read here: take the 16-bit model that they were made from"
        f"{which} ({command}), and hold that in few bits with {param('quantize')}"
    )


def holds_fp8(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are 8-bit floats with scales, which can be turned into bfloat16."""
    settings = raw.get("quantization_config")
    if not isinstance(settings, Mapping):
        return False
    return settings.get("quant_method") in ("fp8", "fbgemm_fp8") or (
        settings.get("quant_method") == "compressed-tensors" and settings.get("format") == "float-quantized"
    )


def _bnb_bits(settings: Mapping[str, Any]) -> int | None:
    return 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None


def check_places(
    wanted: Mapping[str, Collection[FolderKind]],
    given: Mapping[str, Path | Sequence[Path] | None],
    optional: Collection[str] = (),
) -> None:
    """Refuse a folder of another kind than its parameter takes, before any of them is read.

    Args:
        wanted: Kinds of folders that each parameter of a call takes.
        given: Its folders; None where there is none. What shows no kind is left to those who read it.
        optional: Parameters that need not be given.

    Raises:
        UserError: Folders stand in each other's place, or one in that of a parameter that is free or not of this call.
    """
    places = {
        name: [value] if isinstance(value, Path) else list(value) for name, value in given.items() if value is not None
    }
    wrong = {
        name: (path, kind)
        for name, paths in places.items()
        for path in paths
        if (kind := _kind(path, wanted[name])) is not None
    }
    if not wrong:
        return
    found = [
        f"{param(name, path)} is {articled(kind)}, expected {_one_of(wanted[name])}"
        for name, (path, kind) in wrong.items()
    ]
    moved: dict[str, Path] = {}
    for path, kind in wrong.values():
        free = [name for name, kinds in wanted.items() if kind in kinds and name not in moved]
        if place := next((name for name in free if name in wrong or not places.get(name)), None):
            moved[place] = path
    if moved.keys() == wrong.keys():
        raise UserError("; ".join(found), remedy=f"they are swapped: give {params(**moved)}")
    left = next(name for name in wrong if name not in moved)
    needed = next(iter(wanted[left]))
    ways = [f"give it as {params(**moved)}"] if moved else []
    if not moved or left not in optional:
        ways.append(
            f"{'' if moved else 'give '}{articled(needed)} such as {call(_MAKERS[needed])} makes as {param(left)}"
        )
    raise UserError("; ".join(found), remedy=", and ".join(ways))


def _kind(path: Path, wanted: Collection[FolderKind]) -> FolderKind | None:
    """The kind of a folder that is of none of those that are wanted."""
    kinds: list[FolderKind] = [kind for kind, marker in MARKERS.items() if (path / marker).is_file()]
    return None if not kinds or any(kind in wanted for kind in kinds) else kinds[0]


def _one_of(kinds: Collection[FolderKind]) -> str:
    return " or ".join(f"{articled(kind)} ({MARKERS[kind]})" for kind in kinds)


def wrong_place(path: Path) -> CheckpointError:
    """Build the error for a path that was given for a checkpoint folder and has no config.json."""
    made = Path("checkpoints", path.stem if path.is_file() else path.name)
    if path.is_file():
        return CheckpointError(f"{path} {_of_file(path, made)}")
    if not path.exists() and (wanted := repository(str(path))) is not None:
        return CheckpointError(
            f"{path} does not exist here (working folder: {Path.cwd()}). If it is a model on the Hub: "
            f"{call('download', repo_id=wanted)}, then give {made}"
        )
    if not path.is_dir():
        return CheckpointError(
            f"{path / _MODEL_FILE} does not exist: there is no folder {path} (working folder: {Path.cwd()}); make one "
            f"with {call('download')} or {call('convert')}"
        )
    if what := _of_folder(path, {entry.name for entry in path.iterdir()}, made):
        return CheckpointError(f"{path} {what}")
    return CheckpointError(
        f"{path / _MODEL_FILE} does not exist; a checkpoint folder has {_MODEL_FILE}, *.safetensors and tokenizer "
        f"files. Make one with {call('convert')}"
    )


def no_adapter(path: Path) -> str | None:
    """Describe a path that was given for an adapter folder and has no settings; None if it tells nothing."""
    if path.is_file() and path.suffix == ".gguf":
        made = call("convert", source=path, base_dir="BASE", destination_path=f"out/lora/{path.stem}")
        return f"{path} is a GGUF file: if it holds an adapter, convert it with {made}"
    if path.is_file():
        inside = (path.parent / _ADAPTER_FILE).is_file()
        folder = f"the folder of the adapter, {path.parent}" if inside else f"a folder with {_ADAPTER_FILE}"
        return f"{path} is a file: give {folder}"
    if not path.exists() and (wanted := repository(str(path))) is not None:
        return f"{path} does not exist here. If it is on the Hub: {call('download', repo_id=wanted)}"
    if not path.is_dir():
        return None
    if (path / _MODEL_FILE).is_file():
        return f"{path} is a model and no adapter: it has no {_ADAPTER_FILE}"
    what = _of_folder(path, {entry.name for entry in path.iterdir()}, path)
    return f"{path} {what}" if what else None


def _of_file(path: Path, made: Path) -> str:
    if path.suffix == ".gguf":
        return f"is a GGUF file: convert it with {call('convert', source=path, destination_path=made)}"
    if (path.parent / _MODEL_FILE).is_file() or (path.parent / _ADAPTER_FILE).is_file():
        return f"is a file of the folder {path.parent}: give the folder"
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return (
            "is a torch file: bring it into a checkpoint folder with "
            f"{call('convert', source=path, destination_path=made)}"
        )
    return f"is a file: give a folder with {_MODEL_FILE}, weights and tokenizer"


def _of_folder(path: Path, names: set[str], made: Path) -> str | None:
    if foreign := foreign_adapter(path, names):
        return foreign
    if _ADAPTER_FILE in names:
        return (
            "is an adapter and no model: put it into its base first, with "
            f"{call('merge', adapter_dir=path, destination_path=f'{path}-merged')}"
        )
    if weights := [name for name in _ADAPTER_WEIGHTS if name in names]:
        copies = [state for state in _states(path) if (state / _ADAPTER_FILE).is_file()]
        way = f"copy {copies[-1] / _ADAPTER_FILE}" if copies else "bring it back from where the adapter came from"
        return (
            f"holds {weights[0]} without {_ADAPTER_FILE}, which says rank, scale and base: {way} (each checkpoint of a "
            "run has the same one)"
        )
    if "run.yaml" in names and "states" in names:
        return _unfinished(path)
    if "consolidated.safetensors" in names:
        return (
            "is in Mistral's own layout (consolidated.safetensors, params.json): take the files of Hugging Face's "
            "layout (config.json, model-*.safetensors), which mostly lie in the same repository: "
            f"{call('download', repo_id=f'OWNER/{path.name}')}"
        )
    if any(re.fullmatch(r"consolidated\.\d\d\.pth|lit-llama\.pth|lit_model\.pth", name) for name in names):
        return f"is no folder of Hugging Face's: convert it with {call('convert', source=path, destination_path=made)}"
    if "dataset_dict.json" in names:
        return f"is a data folder and no model: train a model on it with {call('finetune', data_dir=path)}"
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        convert = call("convert", source=path / ggufs[0], destination_path=made)
        return f"holds GGUF files: convert one with {convert}"
    inner = [name for name in ("final", "merged") if (path / name / _MODEL_FILE).is_file()]
    steps = sorted((name for name in names if re.fullmatch(r"checkpoint-\d+", name)), key=lambda name: int(name[11:]))
    if found := inner + [name for name in reversed(steps) if _is_result(path / name)]:
        return f"is the folder of a run, with {', '.join(found[:3])} in it: give {path / found[0]}"
    return None


def _is_result(folder: Path) -> bool:
    return (folder / _MODEL_FILE).is_file() or (folder / _ADAPTER_FILE).is_file()


def _unfinished(path: Path) -> str:
    """A run of ours that has not ended: it goes on, or one of its states is used."""
    states = [state for state in _states(path) if _is_result(state)]
    method = "full" if states and (states[-1] / _MODEL_FILE).is_file() else "lora"
    go_on = call("finetune", config=path / "run.yaml", method=method, resume="auto")
    now = f", or give its newest state {states[-1]}" if states else ""
    return f"is a run that has not ended: go on with {go_on}{now}"


def _states(path: Path) -> list[Path]:
    return sorted((path / "states").glob("step-*"))


def foreign_adapter(path: Path, names: set[str]) -> str | None:
    """Return the adapter of another program in a folder, and what to do with it."""
    if "adapters.safetensors" in names or "adapters.npz" in names:
        convert = call("convert", source=path, base_dir="BASE", destination_path=f"out/lora/{path.name}")
        return f"holds an adapter of mlx: turn it into PEFT's with {convert}"
    if torchtune := sorted(name for name in names if _TORCHTUNE.fullmatch(name)):
        return (
            f"holds {torchtune[0]} of torchtune: let torchtune write Hugging Face's layout (FullModelHFCheckpointer, "
            "which also writes adapter_model.safetensors with adapter_config.json), and give that folder"
        )
    return None
