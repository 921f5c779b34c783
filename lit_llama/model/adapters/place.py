"""An adapter's tensors on a model. What they are named decides what is adapted; the settings are checked against it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.adapters.lora import adapt, adaptable, adapters
from lit_llama.model.adapters.low_rank import LoRAEmbedding, LowRank
from lit_llama.model.adapters.rows import PART as ROWS_PART
from lit_llama.model.adapters.rows import RowsEmbedding, RowsLinear
from lit_llama.model.adapters.settings import AdapterSettings, describe_targets
from lit_llama.model.adapters.tensors import AdapterFile
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.weights import check_names
from lit_llama.wording import call, param

_PARTS = (*LowRank.PARTS, *LoRAEmbedding.PARTS, "lora_magnitude_vector")
_BASE = ".base_layer.weight"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
OTHER_BASE = "other_base"
"""Attribute of a model that names a matrix which is an adapter's and not its base's."""
_FEW = 1 / 8
"""Most of the rows of a matrix that new tokens may have; of another base's, nearly all differ."""


@dataclass(frozen=True)
class Placed:
    """Form that an adapter has taken on a model.

    Attributes:
        lora: Settings that say the same of this model, module by module where no list of names can.
        remarks: What was left out or decided, for people.
        base: Matrices that take the place of the base's, by name: its rows of new tokens are the adapter's.
    """

    lora: LoRAConfig
    remarks: tuple[str, ...]
    base: Mapping[str, Tensor]


def adapted_module(name: str) -> str | None:
    """Return the module whose update of low rank a tensor belongs to."""
    return next((name.removesuffix(f".{part}") for part in _PARTS if name.endswith(f".{part}")), None)


def copied_module(name: str) -> str | None:
    """Return the module whose whole copy a tensor is."""
    known = adapted_module(name) or name.endswith((_BASE, ROWS_PART)) or not name.endswith(".weight")
    return None if known else name.removesuffix(".weight")


def place(
    model: nn.Module, settings: AdapterSettings, file: AdapterFile, base: Mapping[str, Tensor] | None = None
) -> Placed:
    """Put an adapter on `model`, in place; on a model without storage, the adapter alone is loaded.

    Args:
        model: The base model.
        settings: The adapter's settings.
        file: Its tensors.
        base: The tensors of the base by name, for a model without storage.

    Raises:
        CheckpointError: Names or shapes do not fit the model, or the settings say otherwise than the tensors.
        IntegrityError: The file holds another base's matrix.
    """
    weights, remarks = dict(file.tensors), list(file.remarks)
    ground = _Ground(model, base or {})
    _check_parts(model, file, weights)
    below = {name: weights.pop(name) for name in list(weights) if name.endswith(_BASE)}
    brought = _check_base(ground, file, below, remarks)
    saved = _settle_copies(ground, settings, file, weights, remarks)
    adapted = sorted({module for name in weights if (module := adapted_module(name))})
    copied = sorted({module for name in weights if (module := copied_module(name))})
    rows = sorted(name.removesuffix(f".{ROWS_PART}") for name in weights if name.endswith(ROWS_PART))
    _check_asked(model, settings, file, adapted, copied, remarks)
    if both := sorted(set(adapted) & {*copied, *rows} | set(copied) & set(rows)):
        raise CheckpointError(f"{file.path} holds {both[0]} twice: by an update of low rank, whole, or by its rows")
    try:
        adapt(model, settings.lora, adapted, copied)
    except UserError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    tied = _put_rows(model, settings, file, rows)
    _fill(model, settings, file, weights)
    if tied is not None:
        embedding, head = tied
        head.rows = embedding.rows
    if settings.lora.alpha == 0 and adapted:
        remarks.append(f"{settings.path}: lora_alpha is 0: the updates of low rank change nothing")
    targets = settings.lora.target_modules if settings.plain else adapted or settings.lora.target_modules
    return Placed(replace(settings.lora, target_modules=targets, modules_to_save=saved), tuple(remarks), brought)


class _Ground:
    """The weights of the base: those of the model, or read where it has no storage."""

    def __init__(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        self.model, self._stored = model, stored
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self._parameters.get(name)
        return None if found is None else tuple(found.shape)

    def value(self, name: str) -> Tensor | None:
        found = self._parameters.get(name)
        if found is None or not found.is_meta:
            return found
        tied = f"{_EMBEDDING}.weight" if name == f"{_HEAD}.weight" and self.ties else name
        return self._stored.get(name, self._stored.get(tied))

    def bring(self, name: str, value: Tensor) -> None:
        """Put another matrix on the model; a tied head follows its embedding."""
        old, tied = self._parameters[name], self.ties
        new = nn.Parameter(value.to(old) if not old.is_meta else old, requires_grad=False)
        for end in (_EMBEDDING, _HEAD):
            if f"{end}.weight" == name or tied:
                self.model.get_submodule(end).weight = new
                self._parameters[f"{end}.weight"] = new
        setattr(self.model, OTHER_BASE, name)

    @property
    def ties(self) -> bool:
        """Whether the head is the embedding."""
        head = self._parameters.get(f"{_HEAD}.weight")
        return head is not None and head is self._parameters.get(f"{_EMBEDDING}.weight")

    def same(self, name: str, value: Tensor) -> bool:
        """Whether a value is that of the base, in its dtype."""
        known = self.value(name)
        return known is not None and known.shape == value.shape and torch.equal(known, value.to(known))


def _check_parts(model: nn.Module, file: AdapterFile, weights: Mapping[str, Tensor]) -> None:
    """Refuse what no part of an adapter is, and matrices of an embedding with more tokens than the base has."""
    for name, value in weights.items():
        if name.endswith(".bias"):
            raise CheckpointError(f"{file.path} holds {name}: trained biases are not implemented (only bias none)")
        if not (adapted_module(name) or copied_module(name) or name.endswith((_BASE, ROWS_PART))):
            raise CheckpointError(f"{file.path} holds {name}, which is no part of a LoRA adapter")
        module = name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".base_layer")
        if module not in (_EMBEDDING, _HEAD) or value.ndim != 2:
            continue
        rows = {"lora_embedding_A": value.shape[1], "lora_B.weight": value.shape[0], "weight": value.shape[0]}
        found = next((rows[end] for end in rows if name.endswith(f".{end}") and not name.endswith("A.weight")), 0)
        have = next(iter(model.get_submodule(module).parameters())).shape[0]
        if found > have:
            resized = call("convert", source="BASE", destination_path="BASE-resized", resize_vocab=found)
            raise CheckpointError(
                f"{file.path}: {name} has {found} rows, the embedding of the base {have}: it was trained with more "
                f"tokens. Give the base rows for them: {resized}, then name it with {param('base_dir', 'BASE-resized')}"
            )


def _check_base(
    ground: _Ground, file: AdapterFile, stored: Mapping[str, Tensor], remarks: list[str]
) -> dict[str, Tensor]:
    """Raise unless these are the base's own: PEFT writes the matrix below an adapted embedding or head, too.

    Rows of a few tokens may differ: those that were added before the training began with other values than rows that
    are given to the base now. PEFT loads the whole matrix into the base.

    Returns:
        The matrices with such rows, which are on the model now.
    """
    brought = {}
    for name, value in stored.items():
        plain = name.removesuffix(_BASE) + ".weight"
        shape = ground.shape(plain)
        if shape != tuple(value.shape):
            found = "no such matrix" if shape is None else f"one of {shape}"
            raise CheckpointError(f"{file.path} holds {name} of {tuple(value.shape)}, the base model has {found}")
        known = ground.value(plain)
        if known is None or ground.same(plain, value):
            continue
        others = int((known != value.to(known)).any(dim=1).sum())
        if plain.removesuffix(".weight") not in (_EMBEDDING, _HEAD) or others > _FEW * len(value):
            raise IntegrityError(
                f"{file.path} holds {name} with other values than the base model: it was trained on another base; "
                f"name that one with {param('base_dir')}"
            )
        remarks.append(f"{file.path}: {others} rows of {plain} are taken from the adapter, with which it was trained")
        brought[plain] = value
        ground.bring(plain, value)
    return brought


def _settle_copies(
    ground: _Ground, settings: AdapterSettings, file: AdapterFile, weights: dict[str, Tensor], remarks: list[str]
) -> list[str]:
    """Decide on matrices that are stored whole: trained copies, or what `save_embedding_layers` leaves beside.

    PEFT loads a matrix that modules_to_save does not name into the base itself: a tied head follows its embedding.

    Returns:
        What modules_to_save has to say of those that stay.
    """
    saved, present = list(settings.lora.saved), dict(ground.model.named_modules())
    unlisted = []
    for name in list(weights):
        if (module := copied_module(name)) is None:
            continue
        if module not in present:
            raise CheckpointError(f"{file.path} holds {module} whole, which is no module of the base model")
        if saved and module.endswith(tuple(saved)):
            continue
        if ground.same(name, weights[name]):
            del weights[name]
            remarks.append(f"{file.path}: {name} is that of the base and left out")
        else:
            unlisted.append(module)
    follows = set(unlisted) | ({_EMBEDDING} if settings.tied and f"{_EMBEDDING}.weight" in weights else set())
    if ground.ties and follows & {_EMBEDDING, _HEAD}:
        ends = [end for end in (_EMBEDDING, _HEAD) if f"{end}.weight" in weights]
        if len(ends) == 2 and not torch.equal(*(weights[f"{end}.weight"] for end in ends)):
            raise CheckpointError(
                f"{file.path} holds {_EMBEDDING} and {_HEAD} whole with different values, but the head of the base is "
                "its embedding and modules_to_save names neither"
            )
        for end in (_EMBEDDING, _HEAD):
            weights.setdefault(f"{end}.weight", weights[f"{ends[0]}.weight"])
            unlisted.append(end)
    if unlisted:
        unlisted = sorted(set(unlisted) - {module for module in unlisted if saved and module.endswith(tuple(saved))})
        remarks.append(f"{file.path}: {', '.join(unlisted)} are other than the base's and taken as whole copies")
    return saved + unlisted


def _check_asked(
    model: nn.Module,
    settings: AdapterSettings,
    file: AdapterFile,
    adapted: list[str],
    copied: list[str],
    remarks: list[str],
) -> None:
    """Compare the modules with those that the settings ask for."""
    able = adaptable(model)
    if unknown := [name for name in adapted if name not in able]:
        raise CheckpointError(f"{file.path} adapts {unknown[0]}, which is no linear layer of the base model")
    if unasked := [name for name in adapted if settings.names(name) is False]:
        raise CheckpointError(
            f"{file.path} adapts {unasked[0]}{_more(unasked)}, which {settings.path.name} does not ask for "
            f"({describe_targets(settings)}): correct the settings, or download both files again"
        )
    if missing := [name for name in able if settings.names(name) and name not in (*adapted, *copied)]:
        remarks.append(
            f"{settings.path} asks for {missing[0]}{_more(missing)}, of which {file.path.name} holds nothing: left as "
            "in the base"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if names[1:] else ""


def _put_rows(
    model: nn.Module, settings: AdapterSettings, file: AdapterFile, modules: list[str]
) -> tuple[RowsEmbedding, RowsLinear] | None:
    """Put trained rows on the embedding or head; gives both where the head follows the embedding."""
    for name in modules:
        ids = next((ids for key, ids in settings.tokens.items() if f".{name}".endswith(f".{key}")), None)
        if ids is None:
            raise CheckpointError(f"{file.path} holds rows of {name}, but trainable_token_indices does not say which")
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding | nn.Linear):
            raise CheckpointError(f"{file.path} holds rows of {name}, which is no embedding or head")
        if max(ids, default=0) >= (size := module.weight.shape[0]):
            raise CheckpointError(
                f"{settings.path}: trainable_token_indices has {max(ids)}, the base has {size} rows: give it more with "
                f"{call('convert', resize_vocab='ROWS', inline=True)}, then name it with {param('base_dir')}"
            )
        tied = name == _EMBEDDING and _HEAD not in modules and model.get_submodule(_HEAD).weight is module.weight
        rows = RowsEmbedding(module, ids) if isinstance(module, nn.Embedding) else RowsLinear(module, ids)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, rows)
        if tied and isinstance(rows, RowsEmbedding):
            below = model.get_submodule(_HEAD)
            if type(below) is not nn.Linear:
                raise CheckpointError(f"{file.path} adapts a head that follows trained rows of its embedding")
            head = RowsLinear(below, ids, rows)
            model.lm_head = head
            return rows, head
    return None


def _fill(model: nn.Module, settings: AdapterSettings, file: AdapterFile, weights: Mapping[str, Tensor]) -> None:
    """Give every parameter of the adapter its value."""
    places = {f"{name}.{part}": (owner, part) for name, owner in adapters(model) for part in owner.parts()}
    check_names(file.path, set(places), weights)
    for name, value in weights.items():
        owner, part = places[name]
        parameter = owner.parts()[part]
        if parameter.shape != value.shape:
            rank, _ = settings.lora.shape_of(name.removesuffix(f".{part}"))
            raise CheckpointError(
                f"{file.path}: {name.removesuffix('.weight')} is {tuple(value.shape)}, the base model with r {rank} "
                f"needs {tuple(parameter.shape)}"
            )
        loaded = value.to(device=None if parameter.is_meta else parameter.device, dtype=parameter.dtype)
        setattr(owner, owner.PARTS[part], nn.Parameter(loaded))
