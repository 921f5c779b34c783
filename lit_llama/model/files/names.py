"""Names of stored tensors, as the wrappers of other programs leave them -> those of Hugging Face's LLaMA."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lit_llama.errors import CheckpointError

_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "pretrained_model.",
    "base_model.model.",
)
"""What DDP and DeepSpeed, torch.compile, FSDP, Fabric, TRL and PEFT put before the names of what they wrap."""
_INSIDE = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_INNER = ("layers.", "embed_tokens.", "norm.")
"""Names of a decoder that was saved without its head, as AutoModel does."""
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?=(lm_head\.)?)")
"""Beginnings of the names of a text model in one that sees images, too."""
_VISION = (
    *("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    *("visual.", "model.visual."),
)
_GUESSING = ("mtp.", "model.mtp.")
"""Layers of a model that guess tokens beyond the next, of which transformers computes none, either."""
_BUFFER = "rotary_emb.inv_freq"
_HEADS = ("v_head.", "value_head.", "score.", "classifier.", "reward_head.", "regression_head.")
"""Heads of reward and value models beside the language model's own."""


@dataclass(frozen=True)
class Tidied:
    """The tensors of a model among those of a file.

    Attributes:
        names: The stored name of each tensor, by its name in the model, in the order stored.
        remarks: What was taken off names or left out, for people.
    """

    names: dict[str, str]
    remarks: list[str] = field(default_factory=list)


def plain_name(stored: str) -> str:
    """Take off what wrappers put before and into a name; the names of the model itself stay as they are."""
    name = _INSIDE.sub("", stored)
    while found := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(found)
    if text := _TEXT.match(name):
        name = ("" if text[1] else "model.") + name[text.end() :]
    while name.startswith("model.model."):
        name = name.removeprefix("model.")
    return f"model.{name}" if name.startswith(_INNER) else name


def tidy(path: Path, stored: Iterable[str]) -> Tidied:
    """Match stored tensors with those of the model, without old buffers, heads of reward models, layers that guess, and
    vision towers.

    Args:
        path: File or folder, for messages.
        stored: Names as they are stored.

    Raises:
        CheckpointError: Two stored tensors have one name once wrappers are taken off.
    """
    names: dict[str, str] = {}
    heads, renamed, seeing, guessing = [], [], [], []
    for raw in stored:
        name = plain_name(raw)
        if name.endswith(_BUFFER):  # old files carry it; it follows from the configuration
            continue
        if name.startswith(_VISION):
            seeing.append(raw)
            continue
        if name.startswith(_GUESSING):
            guessing.append(raw)
            continue
        if name.startswith(_HEADS):
            heads.append(raw)
            continue
        if name in names:
            raise CheckpointError(f"{path} holds {name} twice: as {names[name]} and as {raw}; keep one of them")
        names[name] = raw
        if name != raw and "language_model." not in raw:
            renamed.append(raw)
    remarks = []
    if renamed:
        first = renamed[0]
        remarks.append(
            f"{path}: {len(renamed)} tensors are named as by a wrapper: {first} is read as {plain_name(first)}"
        )
    if seeing:
        remarks.append(
            f"{path}: the text model alone is read, and alone in what is made of it: {len(seeing)} tensors of vision "
            f"tower and projector ({seeing[0]} ...) are left out"
        )
    if guessing:
        remarks.append(
            f"{path}: {len(guessing)} tensors of layers that guess tokens beyond the next ({guessing[0]} ...) are left "
            "out: the language model needs none"
        )
    if heads:
        what = f"{len(heads)} tensors of a reward or value head ({', '.join(heads[:2])})"
        remarks.append(f"{path}: {what} are left out: the language model needs none")
    return Tidied(names, remarks)
