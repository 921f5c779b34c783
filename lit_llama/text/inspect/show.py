"""Samples as a person sees them: every token, whether it is trained, and which are control tokens."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.text import Text

from lit_llama.console import visible
from lit_llama.errors import CheckpointError, DataError, IntegrityError, UserError
from lit_llama.progress import stdout
from lit_llama.text.dataset.folder import Split, read_meta
from lit_llama.text.dataset.pairs import PairSplit
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.stream import Streamer
from lit_llama.wording import param

_STYLES = {"trained": "bold green", "masked": "bright_black", "control": "bold reverse magenta"}
_LEGEND = "trained: in the loss", "masked: read only", "control token"
_PART = "‥"  # a token that ends within a character


class ShownToken(NamedTuple):
    """One token. `text` is "" where it ends within a character, which then stands with the token that completes it."""

    text: str
    id: int
    trained: bool
    control: bool

    @property
    def kind(self) -> Literal["trained", "masked"]:
        """Kind of the token: whether it carries loss."""
        return "trained" if self.trained else "masked"


@dataclass(frozen=True)
class ShownSample:
    """A sample, and what to call it."""

    row: int
    where: str
    split: str
    tokens: Sequence[ShownToken]


def shown_sample(
    tokenizer: Tokenizer, input_ids: Sequence[int], labels: Sequence[int], *, row: int, where: str, split: str
) -> ShownSample:
    """Pair every id with its piece of text; the first token of a sample is never predicted, hence never trained."""
    spelling = {token_id: token for token, token_id in tokenizer.control.items()}
    trained = [index > 0 and label != IGNORE_INDEX for index, label in enumerate(labels)]
    tokens: list[ShownToken] = []
    start = 0
    for index, token_id in enumerate([*input_ids, None]):
        if token_id is not None and token_id not in spelling:
            continue
        ids = [int(other) for other in input_ids[start:index]]
        for other, piece in zip(ids, _pieces(tokenizer, ids), strict=True):
            tokens.append(ShownToken(piece, other, trained[len(tokens)], control=False))
        if token_id is not None:
            tokens.append(ShownToken(spelling[token_id], int(token_id), trained[index], control=True))
        start = index + 1
    return ShownSample(row, where, split, tokens)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id completes."""
    streamer = Streamer(tokenizer)
    pieces = [streamer.push([token_id]) for token_id in ids]
    held = next((count for count, piece in enumerate(reversed(pieces)) if piece), len(pieces))
    rest = streamer.flush()
    # What is left is a character cut in its middle, unless the data themselves hold U+FFFD.
    if held and (not rest.endswith("\ufffd") or tokenizer.encode(rest)[-held:] == list(ids[-held:])):
        pieces[-1] = rest
    return pieces


def show_rows(
    data_dir: Path | str, rows: str = "0-2", split: str = "train", tokenizer_path: Path | None = None
) -> None:
    """Print samples of a data folder.

    Raises:
        UserError: `rows` is no list of positions in the split.
        DataError: The data folder cannot be used.
        CheckpointError: The tokenizer is missing.
        IntegrityError: It is not the one that the data were made with.
    """
    data_dir, ranges = Path(data_dir), parse_rows(rows)
    tokenizer = recorded_tokenizer(data_dir, tokenizer_path)
    pairs = read_meta(data_dir, kind=None).get("kind") == "preference"
    samples = PairSplit(data_dir, split, empty=True) if pairs else Split(data_dir, split, empty=True)
    if not len(samples):
        raise UserError(f"{data_dir} has no {split} split: it was prepared with {param('test_split_size', 0)}")
    last = max(part[-1] for part in ranges)
    if last >= len(samples):
        raise UserError(f"names {last}, but {data_dir / split} has the rows 0 to {len(samples) - 1}", parameter="rows")
    console = stdout()
    plain = not console.is_terminal or console.no_color
    console.print(_legend(plain))
    for row in itertools.chain.from_iterable(ranges):
        for name, ids, labels in samples.answers(row) if isinstance(samples, PairSplit) else [("", *samples[row])]:
            where = f"{split} row {row}" + (f", {name}" if name else "")
            sample = shown_sample(tokenizer, ids.tolist(), labels.tolist(), row=row, where=where, split=split)
            count = sum(token.trained for token in sample.tokens)
            said = f"\n{sample.where}: {len(ids)} tokens, {count} of them trained"
            console.print(Text(said, "" if plain else "bold"))
            console.print(Text(plain_text(sample.tokens)) if plain else coloured_text(sample.tokens))


def parse_rows(rows: str) -> list[range]:
    """Parse positions out of a list such as 0,17 or 3-5.

    Raises:
        UserError: It is none.
    """
    ranges = []
    if re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", rows):
        ends = [part.partition("-") for part in rows.split(",")]
        ranges = [range(int(first), int(last or first) + 1) for first, _, last in ends]
    if not ranges or not all(ranges):
        raise UserError(parameter="rows", value=rows, expected="positions from 0 on, such as 0,17 or 3-5")
    return ranges


def recorded_tokenizer(data_dir: Path, path: Path | None) -> Tokenizer:
    """Open the tokenizer that a data folder was made with, at `path` or where it was then.

    Raises:
        DataError: The data folder cannot be used.
        CheckpointError: The tokenizer is missing.
        IntegrityError: It is another one.
    """
    recorded = read_meta(data_dir, kind=None).get("tokenizer", {})
    if path is None:
        if "path" not in recorded:
            raise DataError(f"{data_dir} does not say which tokenizer it was made with; prepare the data again")
        path = Path(recorded["path"])
        if not path.exists():
            raise CheckpointError(
                f"{data_dir} was made with the tokenizer {path}, which is not there; name it with "
                f"{param('tokenizer_path')}"
            )
    tokenizer = Tokenizer.from_path(path)
    if tokenizer.fingerprint() != recorded.get("fingerprint"):
        raise IntegrityError(
            f"{path} is not the tokenizer that {data_dir} was made with; name that with {param('tokenizer_path')}"
        )
    return tokenizer


def plain_text(tokens: Iterable[ShownToken]) -> str:
    """Render tokens with ⟦trained⟧ runs and ⟪control⟫ tokens between brackets."""
    parts, inside = [], False
    for token in tokens:
        if token.trained != inside:
            parts.append("⟦" if token.trained else "⟧")
            inside = token.trained
        text = visible(token.text)
        parts.append(f"⟪{text}⟫" if token.control else text)
    return "".join(parts) + ("⟧" if inside else "")


def coloured_text(tokens: Iterable[ShownToken]) -> Text:
    """Render tokens in colours, their borders, spaces and newlines visible."""
    shown = Text()
    for token in tokens:
        text = (visible(token.text) or _PART).replace(" ", "·").replace("\t", "→").replace("\n", "↵\n")
        style = _STYLES["control" if token.control else token.kind] + (" underline" if token.trained else "")
        body = text.rstrip("\n")
        shown.append(body, style).append("▏", "bright_black").append(text[len(body) :])
    return shown


def _legend(plain: bool) -> Text:
    trained, masked, control = _LEGEND
    if plain:
        return Text(f"⟦{trained}⟧  {masked}  ⟪{control}⟫")
    legend = Text()
    for text, kind in zip(_LEGEND, _STYLES, strict=True):
        legend.append(text, _STYLES[kind] + (" underline" if kind == "trained" else "")).append("   ")
    return legend.append("· space  ↵ newline  ▏ end of a token", "bright_black")
