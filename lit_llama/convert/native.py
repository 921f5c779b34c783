"""A Hugging Face folder as a source."""

from pathlib import Path

from lit_llama.convert.source import META_FILE, NAMES, SETTINGS_FILE, Source
from lit_llama.model.weights import INDEX_FILE, Weights
from lit_llama.text.special import read_object


def open_folder(folder: Path) -> Source:
    """The model in a Hugging Face folder."""
    stored = {name: at for name, at in Weights(folder).locate().items() if not name.endswith("inv_freq")}
    kept = (".json", ".model", ".txt", ".jinja")
    files = {path.name: path for path in folder.iterdir() if path.suffix in kept}
    return Source(
        path=folder,
        kind="Hugging Face",
        config=read_object(folder / SETTINGS_FILE),
        specs={name: (NAMES[at.dtype], at.shape) for name, at in stored.items()},
        read=lambda name: stored[name].read(),
        stored=stored,
        files={name: path for name, path in files.items() if name not in (INDEX_FILE, SETTINGS_FILE, META_FILE)},
    )
