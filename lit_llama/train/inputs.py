"""Inputs of a run: what it reads before it trains, and whether its parts fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lit_llama.conversion.frame import Frame
from lit_llama.errors import DataError, UserError
from lit_llama.folder.manifest import check_folder
from lit_llama.model.adapters.base import base_record
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.weights import Weights
from lit_llama.progress import stderr
from lit_llama.text.dataset.batches import Rows
from lit_llama.text.dataset.folder import SPLITS, FolderKind, Split, data_fingerprint, read_meta
from lit_llama.text.dataset.pair_batches import PairRows
from lit_llama.text.dataset.pairs import PairSplit
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.text.read.formats.sources import read_text
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import check_recorded, check_vocabulary, special_ids
from lit_llama.train.config import TrainConfig
from lit_llama.wording import param

Kind = Literal["samples", "pairs", "answers"]
"""Rows that a method takes: samples with labels, pairs of answers, or pairs and single answers, good or bad."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that the folder of the result will hold of them is read at once: hours later they may be gone.

    Attributes:
        config: Shape of the base.
        splits: Rows to train on, and rows to evaluate on.
        data: meta.json of the data folder.
        template: Its prompt style, a Jinja template.
        base: What a result records of the checkpoint: path, fingerprint, hashes.
        tokenizer: That of the base.
        frame: All of the base but its weights.
        identity: Fingerprints of data, base and tokenizer, by which a run that goes on knows them again.
    """

    config: LLaMAConfig
    splits: dict[str, Rows]
    data: dict[str, Any]
    template: str
    base: dict[str, Any]
    tokenizer: Tokenizer
    frame: Frame
    identity: dict[str, str]

    @property
    def train(self) -> Rows:
        """Rows to train on."""
        return self.splits["train"]

    @property
    def test(self) -> Rows:
        """Rows to evaluate on."""
        return self.splits["test"]


def read_inputs(checkpoint_dir: Path, data_dir: Path, kind: Kind = "samples") -> Inputs:
    """Read data of a kind, and descriptions; no weight is loaded.

    Raises:
        DataError: The data is not there, cannot be trained on, or does not fit the checkpoint.
        CheckpointError: The checkpoint cannot be used.
        IntegrityError: A file of either folder is not as it was written.
    """
    check_folder(checkpoint_dir)
    config = LLaMAConfig.from_folder(checkpoint_dir)
    meta = read_meta(data_dir, kind=folder_kind(kind))
    tokenizer = _fitting_tokenizer(checkpoint_dir, config, data_dir, meta)
    splits = read_splits(checkpoint_dir, config, data_dir, meta, kind)
    template = read_text(data_dir / TEMPLATE_FILE)
    base = base_record(checkpoint_dir)
    identity = {
        "data": data_fingerprint(data_dir),
        "base": base["fingerprint"],
        "tokenizer": tokenizer.fingerprint(),
    }
    return Inputs(
        config=config,
        splits=splits,
        data=meta,
        template=template,
        base=base,
        tokenizer=tokenizer,
        frame=Frame.read(checkpoint_dir, tokenizer),
        identity=identity,
    )


def folder_kind(kind: Kind) -> FolderKind:
    """Return the kind of data folder in which such rows are."""
    return "supervised" if kind == "samples" else "preference"


def read_splits(
    checkpoint_dir: Path, config: LLaMAConfig, data_dir: Path, meta: Mapping[str, Any], kind: Kind = "samples"
) -> dict[str, Rows]:
    """Read the rows of a data folder with this meta.json, which a model with `config` can be trained on.

    The test split may be empty where the data was prepared so.

    Raises:
        DataError: A split is not there, has no trained token, rows without the answers that are wanted, or samples too
            long for the model.
    """
    untested = meta.get("splits", {}).get("test", {}).get("rows") == 0
    splits: dict[str, Rows] = {}
    for name in SPLITS:
        empty = untested and name == "test"
        split = splits[name] = (
            Split(data_dir, name, empty=empty)
            if kind == "samples"
            else PairRows(PairSplit(data_dir, name, empty=empty))
        )
        if isinstance(split, PairRows) and kind == "pairs" and (split.answers == 0).any():
            raise DataError(
                f"{data_dir}: row {int((split.answers == 0).any(1).argmax())} of the {name} split has one answer, "
                f"expected a chosen and a rejected one; {param('dpo.loss', 'kto')} takes single answers"
            )
        if len(split):
            _check_split(name, split, checkpoint_dir, config, data_dir)
    return splits


def fitting(train: TrainConfig, splits: Mapping[str, Rows], data_dir: Path) -> tuple[TrainConfig, list[str]]:
    """Fit the settings to data with few rows, or with no rows to test on.

    Returns:
        They, with smaller batches where there are fewer rows; and what has to be said of it.

    Raises:
        UserError: They ask for evaluations, and there are no rows for them.
    """
    rows, remarks = len(splits["train"]), []
    if rows < train.batch_size:
        remarks.append(
            f"{data_dir} has {rows} rows for training: {param('train.batch_size')} is {rows}, not {train.batch_size}"
        )
        train = replace(train, batch_size=rows)
    if not len(splits["test"]):
        for flag, asked in (
            (param("train.keep", "best"), train.keep == "best"),
            (param("train.patience"), train.patience),
        ):
            if asked:
                raise UserError(
                    f"{flag} goes by the test loss, but {data_dir} has no test split: leave it out, or prepare the "
                    f"data with a {param('test_split_size')} above 0"
                )
        remarks.append(f"{data_dir} has no test split: no evaluation, no sample answers")
    return train, remarks


def _fitting_tokenizer(checkpoint_dir: Path, config: LLaMAConfig, data_dir: Path, meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the base, proven to be the one that the data was prepared with."""
    tokenizer = Tokenizer.from_path(checkpoint_dir)
    check_vocabulary(checkpoint_dir, config.vocab_size, tokenizer)
    check_recorded(checkpoint_dir, tokenizer, checkpoint_dir)
    for remark in (
        *Weights(checkpoint_dir).remarks,
        *tokenizer.remarks,
        *special_ids(checkpoint_dir, tokenizer).remarks,
    ):
        stderr().print(remark)
    recorded = meta.get("tokenizer", {})
    if tokenizer.fingerprint() != recorded.get("fingerprint"):
        raise DataError(
            f"{data_dir} was prepared with {recorded.get('path')}, whose vocabulary is not that of "
            f"{checkpoint_dir}; prepare it again with {param('tokenizer_path', checkpoint_dir)}"
        )
    return tokenizer


def _check_split(name: str, split: Rows, checkpoint_dir: Path, config: LLaMAConfig, data_dir: Path) -> None:
    longest = split.longest
    if not split.trained_tokens():
        raise DataError(f"{data_dir}: no token of the {name} split carries a loss; prepare the data again")
    if (stranger := split.stranger(config.vocab_size)) is not None:
        raise DataError(
            f"{data_dir}: the {name} split holds {stranger}, which is none of the {config.vocab_size} tokens of "
            f"{checkpoint_dir}; prepare the data again"
        )
    if longest > config.context_length:
        raise DataError(
            f"{data_dir}: the longest sample has {longest} tokens, {checkpoint_dir} reads "
            f"{config.context_length}; prepare the data with a smaller {param('max_seq_length')}"
        )
