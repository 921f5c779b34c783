"""Configuration of preparing data: every choice, default and line of help once; quick to import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import DataError, UserError, check_seed
from lit_llama.wording import param

StyleName = Literal["alpaca", "chatml", "ziya", "vicuna", "llama-2", "llama-3", "mistral", "plain"]
StyleChoice = StyleName | Literal["chat_template"]
TrainOn = Literal["all", "last"]
ThoughtsRule = Literal["template", "keep", "drop"]
TypedEnds = Literal["keep", "strip"]
Overflow = Literal["drop", "truncate_prompt", "truncate_response", "split", "error"]
SplitChoice = Literal["auto", "hash", "shuffle", "given"]
Documents = Literal["file", "paragraph", "line"]
Tree = Literal["best", "all"]
OnError = Literal["stop", "skip"]
Quoting = Literal["double", "none"]
DataKind = Literal["auto", "sft-chosen", "preference"]
ExecutorName = Literal["local", "ray"]

ENCODING = 1
"""Version of what rows become. Every change of ids, labels or splits for the same rows and settings raises it, so that
folders that were made before are made anew; test_encoding_version.py holds the bytes of each version."""
NEAR_DUPLICATES = 200_000
"""Rows up to which near-duplicates are looked for unless somebody says otherwise: 340 MB."""
_RULES = (
    *("max_seq_length", "mask_inputs", "train_on", "overflow", "split", "test_split_size", "seed", "near_duplicates"),
    *("thoughts", "typed_ends", "rendered", "test_limit"),
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of a data folder: what is read, how rows become samples, and where they go.

    Args:
        source: Files (JSON, JSONL, CSV, TSV, Parquet, each also .gz or .zst; workbooks as book.xlsx or
            book.xlsx#SHEET), folders, patterns, folders of the datasets library, URLs of files (https://, s3://,
            gs://, hf://, whatever fsspec knows), or data sets of the Hub; several as a.jsonl b.csv; see docs/files.md.
            The schema of every row is recognised: Alpaca, prompt/completion, Dolly, OpenAI messages, ShareGPT, OASST
            trees, plain text; see docs/data.md.
        destination_path: Folder to make, such as data/NAME.
        tokenizer_path: The model folder, a tokenizer.json or a tokenizer.model.
        documents: Of plain text, what belongs together and ends in an end-of-text token: a file, a paragraph between
            blank lines, or a line (as lit-llama's prepare_any_text.py had it).
        prompt_style: How a conversation is put to the model; chat_template is the model's own, which is taken where
            none is named, or alpaca where the model folder has none; see docs/prompts.md.
        max_seq_length: Most tokens of a sample.
        mask_inputs: Train on answers only, not on prompts.
        train_on: Every answer of a conversation, or the last one.
        thoughts: What becomes of thoughts before answers (<think>...</think>, reasoning_content): the chat template
            decides, each answer is trained with its own, or none is.
        typed_ends: An answer that ends in a spelled control token such as </s> keeps it as text, or loses it.
        rendered: Rows of plain text hold control tokens, spelled: they were rendered for this model before.
        overflow: What becomes of a longer row: dropped, losing the oldest turns and the beginning of its question,
            losing the end of its answer, cut into several samples between turns, or an error.
        split: By a hash of the question (rows that ask the same stand on one side, and no row moves when others are
            added), by shuffling as lit-llama did, or as the sources are divided by their names, as train.jsonl and
            test.jsonl are (given). auto is given where the sources are divided, and else hash.
        test_split_size: Rows held out for testing: their share, or with split shuffle their number; 0.05 if it is not
            given, 0 trains on all rows.
        test_limit: Largest share of the rows that a number of rows for testing may come to.
        seed: Of the split and of mixing.
        split_from: A data folder, or a file like those of source: rows that open with a test question of it (but for
            case and white space) are for testing, all others for training, in place of split.
        near_duplicates: Rows up to which nearly equal ones are looked for, at 1.7 kB of memory each; 0 for not at all.
        fields: Our names of fields and those in the data, as instruction=question,output=answer; a field that holds
            something for the model and has no place stops the command, others without one are counted and named.
        ignore_fields: Fields of rows and of messages to be left out, as context,tools.
        as_text: Numbers, lists and objects where a text belongs become JSON text.
        weights: For several sources, how often a row is drawn from each, as 1,0.5.
        data_kind: What becomes of rows with chosen and rejected answers, with rated ones, or with a label that says
            whether an answer is wanted: an error, unless it is said; training on the chosen and wanted answers alone
            (sft-chosen); or a folder of preferences. See docs/data.md.
        where: Rows to keep, by a field: a comparison with a number, a text, true or false, several joined by and, such
            as "score >= 4 and lang == 'en'".
        tree: Of a tree of messages, the best path or every one.
        on_error: A row that cannot be used stops the command, or is dropped with its reason.
        encoding: Of files that are not UTF-8, such as cp1252.
        quoting: Of CSV: quotes around a field are no part of it and doubled inside, or (none) part of the text.
        escape: Of CSV: the character before a quote inside a field, where it is not doubled, such as a backslash.
        executor: Who encodes the rows: this process, or tasks of Ray, on all cores of this machine or on a cluster. The
            folder is the same.
        ray_address: Cluster that is joined, as HOST:PORT, or auto for the one that runs on this machine; without it
            Ray is started here for this command.

    Raises:
        UserError: A number is out of its range, or two settings exclude each other.
    """

    source: str | list[str] = field(default_factory=list)
    destination_path: Path
    tokenizer_path: Path
    documents: Documents | None = None
    prompt_style: StyleChoice | None = None
    max_seq_length: int = 2048
    mask_inputs: bool = True
    train_on: TrainOn = "all"
    thoughts: ThoughtsRule = "template"
    typed_ends: TypedEnds = "keep"
    rendered: bool = False
    overflow: Overflow = "drop"
    split: SplitChoice = "auto"
    test_split_size: float | None = None
    test_limit: float = 1.0
    seed: int = 42
    split_from: Path | None = None
    near_duplicates: int = NEAR_DUPLICATES
    fields: dict[str, str] | None = None
    ignore_fields: list[str] | None = None
    as_text: bool = False
    weights: list[float] | None = None
    data_kind: DataKind = "auto"
    where: str | None = None
    tree: Tree = "best"
    on_error: OnError = "stop"
    encoding: str | None = None
    quoting: Quoting = "double"
    escape: str | None = None
    executor: ExecutorName = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 3 <= self.max_seq_length < 2**31:
            raise DataError(
                parameter="max_seq_length", value=self.max_seq_length, expected=f"3 or more tokens, below {2**31}"
            )
        if self.near_duplicates < 0:
            raise UserError(
                parameter="near_duplicates", value=self.near_duplicates, expected="a number of rows, or 0 for none"
            )
        if self.ray_address is not None and self.executor != "ray":
            raise UserError(
                f"is for {param('executor', 'ray')}: give that, too", parameter="ray_address", value=self.ray_address
            )
        if self.data_kind == "preference":
            self._check_preference()

    def _check_preference(self) -> None:
        """Raise UserError for a setting that has no meaning where answers are compared."""
        for name, wrong, why in (
            (
                "mask_inputs",
                not self.mask_inputs,
                f"is compared by its answers alone: use {param('mask_inputs', True)}",
            ),
            (
                "overflow",
                self.overflow not in ("drop", "error"),
                f"is compared whole: use {param('overflow', 'drop')} or error",
            ),
            ("rendered", self.rendered, "is no plain text: leave it out"),
            ("documents", self.documents is not None, "is no plain text: leave it out"),
        ):
            if wrong:
                raise UserError(
                    f"{param(name, getattr(self, name))} with {param('data_kind', 'preference')}: a preference {why}"
                )

    @property
    def sources(self) -> list[str]:
        """All of `source`, one or several."""
        return [self.source] if isinstance(self.source, str) else list(self.source)

    def rules(self) -> dict[str, Any]:
        """Return the settings that decide how rows become samples, by their names, as meta.json has them."""
        return {name: getattr(self, name) for name in _RULES}
