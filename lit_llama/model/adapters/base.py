"""The base model of an adapter: found where its folder says, beside it, or in the Hub's cache, and proven."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.folder.manifest import MANIFEST, check_folder, hashes
from lit_llama.model.adapters.settings import CONFIG_FILE, AdapterSettings, read_settings
from lit_llama.model.files.checkpoint import fingerprint
from lit_llama.model.files.weights import INDEX_FILE, SINGLE_FILE, Weights, check_finite, weight_files
from lit_llama.model.places import of_sixteen_bits, repository
from lit_llama.objects import as_object, read_text
from lit_llama.progress import stderr, track
from lit_llama.wording import call, param

META_FILE, _MODEL_FILE, _CHECKPOINTS = "meta.json", "config.json", "checkpoints"


def base_of(adapter_dir: Path, base_dir: Path | None = None, *, name: str = "base_dir") -> Path:
    """Find the base model of an adapter folder, proven to be the one it was trained on where the folder says which.

    Args:
        adapter_dir: The adapter.
        base_dir: Where the base is; None looks for it: where the adapter names it, seen from the working folder or
            from a folder above the adapter; where it was when the adapter was trained; under its name beside the
            adapter or in checkpoints/; in the cache of the Hub.
        name: Of the parameter that names the base, for errors.

    Raises:
        CheckpointError: The base is not there.
        IntegrityError: It is another one.
    """
    settings = read_settings(adapter_dir)
    expected = _recorded(adapter_dir)
    if base_dir is not None:
        if not (base_dir / _MODEL_FILE).is_file():
            raise CheckpointError(f"is no checkpoint folder: it has no {_MODEL_FILE}", parameter=name, value=base_dir)
        _check(base_dir, adapter_dir, expected, name)
        return base_dir
    named = Path(settings.base) if settings.base else None
    refusal: UserError | None = None
    for place in _places(adapter_dir, settings, expected.absolute):
        try:
            _check(place, adapter_dir, expected, name)
        except UserError as error:
            refusal = refusal or error
            continue
        if place != named:
            proof = "its weights have the recorded fingerprint" if expected.fingerprint else "no fingerprint proves it"
            stderr().print(f"base model {settings.base!r} of {adapter_dir}: taken from {place}; {proof}", markup=False)
        return place
    raise refusal or _absent(adapter_dir, settings.base, name)


def verify_folders(*folders: Path | None, base_dir: Path | None = None) -> None:
    """Read every byte of folders, and of the bases of adapters among them, and say that all is as it was written.

    Args:
        folders: Of models, adapters or data.
        base_dir: As for `base_of`.

    Raises:
        CheckpointError: The base of an adapter is not there.
        IntegrityError: A file is not as its manifest or the adapter on it says.
        WeightsNotFiniteError: A value of the weights is infinite or not a number.
    """
    for folder in filter(None, folders):
        _verify(folder)
        if (folder / CONFIG_FILE).is_file():
            base = base_of(folder, base_dir)
            _verify(base)
            if (expected := _recorded(folder)).files:
                hashes(dict.fromkeys(set(weight_files(base).values())), whole=True)
                _check(base, folder, expected, "base_dir")


def _verify(folder: Path) -> None:
    proven = check_folder(folder, whole=True)
    said = f"all files are as in {MANIFEST}" if proven else f"no {MANIFEST}, so nothing says what its files should be"
    stderr().print(f"{folder}: {said}")
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        weights = Weights(folder)
        for name in track(list(weights), f"looking at all values of {folder}"):
            check_finite(weights.read(name), name, weights.files[name], whole=True)


def base_record(base: Path) -> dict[str, Any]:
    """Describe the base as an adapter records it: the path as it was given, which moves along with both folders, the
    place on this machine, and what proves it: its fingerprint, and the size and sha256 of each file of weights.
    """
    paths = sorted(set(weight_files(base).values()))
    found = hashes(dict.fromkeys(paths))
    files = {path.name: {"size": path.stat().st_size, "sha256": found[path]} for path in paths}
    return {"path": str(base), "absolute": str(base.resolve()), "fingerprint": fingerprint(base), "files": files}


class _Expected(NamedTuple):
    """What meta.json of an adapter says of its base."""

    fingerprint: str | None = None
    absolute: str | None = None
    files: Mapping[str, Mapping[str, Any]] = {}


def _recorded(adapter_dir: Path) -> _Expected:
    """What proves the base, and its place while the adapter was trained, as far as meta.json says them."""
    meta = adapter_dir / META_FILE
    if not meta.is_file():
        return _Expected()
    try:
        known = as_object(read_text(meta))
        if "source" in known and "base" not in known:  # downloaded: its author gave no fingerprint
            return _Expected()
        base = known["base"]
        absolute = base.get("absolute")
        files = {name: {"size": file["size"], "sha256": file["sha256"]} for name, file in base.get("files", {}).items()}
        return _Expected(str(base["fingerprint"]), absolute if isinstance(absolute, str) else None, files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{meta} does not say which base the adapter belongs to: {error!r}") from error


def _check(base: Path, adapter_dir: Path, expected: _Expected, name: str) -> None:
    check_folder(base)
    if expected.fingerprint is not None and fingerprint(base) != expected.fingerprint:
        raise IntegrityError(
            f"{base} is not the base that {adapter_dir} was trained on: its weights have another fingerprint; "
            f"bring back the original weights and name their folder with {param(name)}, or train again"
        )
    # Weights that were saved anew, in other shards or with other notes in their headers, are told by the fingerprint.
    paths = {path.name: path for path in set(weight_files(base).values())} if expected.files else {}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if sizes != {name: file["size"] for name, file in expected.files.items()}:
        return
    found = hashes({paths[name]: file["sha256"] for name, file in expected.files.items()})
    for name, file in expected.files.items():
        if found[paths[name]] != file["sha256"]:
            raise IntegrityError(
                f"{paths[name]} is damaged: its sha256 is {found[paths[name]][:16]}..., it was "
                f"{file['sha256'][:16]}... when {adapter_dir} was trained on it; bring back the original weights"
            )


def _places(adapter_dir: Path, settings: AdapterSettings, absolute: str | None) -> Iterator[Path]:
    """Folders of models that the name may mean, the most likely first, each once."""
    seen = set()
    for place in _candidates(adapter_dir, settings, absolute):
        try:
            there, real = (place / _MODEL_FILE).is_file(), place.resolve()
        except (OSError, ValueError):  # a name that no file can have
            continue
        if there and real not in seen and _may_be(place, settings.base):
            seen.add(real)
            yield place


def _candidates(adapter_dir: Path, settings: AdapterSettings, absolute: str | None) -> Iterator[Path]:
    named = settings.base
    if named:
        yield Path(named)
    if absolute:
        yield Path(absolute)
    if not named:
        return
    above = [adapter_dir.resolve(), *adapter_dir.resolve().parents]
    yield from (folder / named for folder in above)
    last = re.split(r"[\\/]", named.rstrip("\\/"))[-1]  # of another machine's path, too
    if last in ("", ".", ".."):
        return
    yield Path(_CHECKPOINTS) / last
    yield from (folder / last for folder in above[:2])
    yield from (folder / _CHECKPOINTS / last for folder in above)
    if (cached := _in_cache(named, settings.revision)) is not None:
        yield cached


def _may_be(place: Path, named: str) -> bool:
    """Whether a folder that was downloaded came from the repository of this name, where both are known."""
    try:
        source = as_object(read_text(place / META_FILE))["source"]["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return repository(named) is None or not isinstance(source, str) or source.lower() == named.lower()


def _in_cache(named: str, revision: str | None) -> Path | None:
    """The model in the cache that huggingface_hub and transformers share, if it is there with weights."""
    if repository(named) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    for revisions in dict.fromkeys((revision, None)):
        found = try_to_load_from_cache(named, _MODEL_FILE, revision=revisions)
        if isinstance(found, str):
            folder = Path(found).parent
            if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
                return folder
    return None


def _absent(adapter_dir: Path, named: str, name: str) -> CheckpointError:
    where = f"{adapter_dir / CONFIG_FILE} names the base model {named!r}"
    looked = f"working folder: {Path.cwd()}; looked beside the adapter, in {_CHECKPOINTS}/ and in the Hub's cache, too"
    way = f"name its folder with {param(name)}, or correct base_model_name_or_path"
    plain = of_sixteen_bits(named)
    if plain is not None:
        way = f"it is a quantised copy: take the 16-bit model, probably {plain}, and {way}"
    if (wanted := repository(plain or named)) is not None:
        way = f"{call('download', repo_id=wanted)} brings it; {way}"
    return CheckpointError(f"{where}, which is no checkpoint folder here ({looked}): {way}")
