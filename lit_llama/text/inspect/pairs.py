"""Rows that say the same, within the data and across the splits, and rows that contradict each other.

Shapes: N rows. A row counts under the strictest kind that holds for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_llama.text.inspect.duplicates import Keys, Pairs, Rows, earliest, partners

LISTED = 20  # rows or pairs shown of each finding
CUT = " …"  # stands where an excerpt ends before its text
_EXCERPT, _BEFORE = 320, 80  # characters shown, and of them in front of the first difference

Mask = npt.NDArray[np.bool_]
TextOf = Callable[[int], tuple[str, str]]


class Lister:
    """Writer of rows and pairs of rows as they stand in a report.

    Args:
        place: {"row", "where", "split"} of a row by its index.
        text_of: Prompt and answer of a row by its number; None to list pairs without text.
    """

    def __init__(self, place: Callable[[int], dict[str, Any]], text_of: TextOf | None) -> None:
        self._place = place
        self._text_of = text_of

    def rows(self, found: Rows | Sequence[int], of: int, *, listed: int = LISTED) -> dict[str, Any]:
        """Count the rows that were found among `of`, and list the first of them."""
        return share(len(found), of) | {"listed": [self._place(int(index)) for index in found[:listed]]}

    def pairs(self, first: Rows, second: Rows) -> list[dict[str, Any]]:
        """Return the first pairs, with what surrounds their first difference."""
        listed = []
        for one, other in zip(first[:LISTED].tolist(), second[:LISTED].tolist(), strict=True):
            entry: dict[str, Any] = {"first": self._place(one), "second": self._place(other)}
            if self._text_of is not None:
                texts = [self._text_of(entry[side]["row"]) for side in ("first", "second")]
                for field, both in zip(("prompt", "answer"), zip(*texts, strict=True), strict=True):
                    entry["first"][field], entry["second"][field] = _excerpts(*both)
            listed.append(entry)
        return listed


def share(rows: int, of: int) -> dict[str, Any]:
    """Return a count, and its share of all there are."""
    return {"rows": rows, "share": rows / of if of else 0.0}


def duplicates(exact: Keys, same: Rows, near: Pairs | None, lister: Lister) -> dict[str, Any]:
    """Count rows that repeat an earlier row.

    Args:
        exact: (N,) hash of the texts as they are.
        same: (N,) first row with the same normalised texts.
        near: Pairs of such first rows.
        lister: Writes the pairs.
    """
    rows = np.arange(len(exact))
    twin = earliest(exact)
    found: dict[str, Any] = {}
    for kind, first, holds in (
        ("exact", twin, twin != rows),
        ("normalised", same, (twin == rows) & (same != rows)),
    ):
        repeats = np.flatnonzero(holds)
        found[kind] = share(len(repeats), len(rows)) | {"pairs": lister.pairs(first[repeats], repeats)}
    if near is not None:
        first, second, similarity = near
        repeats, at = np.unique(second, return_index=True)
        pairs = lister.pairs(first[at], repeats)
        for pair, value in zip(pairs, similarity[at].tolist(), strict=False):  # not all are listed
            pair["similarity"] = round(value, 3)
        found["near"] = share(len(repeats), len(rows)) | {"pairs": pairs}
    return found


def leakage(
    exact: Keys, normalised: Keys, same: Rows, near: Pairs | None, train: Mask, test: Mask, lister: Lister
) -> dict[str, Any]:
    """Test rows that also stand in train; shares are of the test rows."""
    found: dict[str, Any] = {}
    left = test.copy()
    partner = {"exact": partners(exact, test, train), "normalised": partners(normalised, test, train)}
    if near is not None:
        partner["near"] = _near_in_train(same, near, train)
    for kind, other in partner.items():
        rows = np.flatnonzero(left & (other >= 0))
        left[rows] = False
        found[kind] = share(len(rows), int(test.sum())) | {"pairs": lister.pairs(other[rows], rows)}
    return share(int((test & ~left).sum()), int(test.sum())) | found


def _near_in_train(same: Rows, near: Pairs, train: Mask) -> Rows:
    """(N,) the first train row that is nearly equal, -1 if there is none."""
    none = len(same)
    in_train = np.full(len(same), none)  # of each first row: the train row that is the same
    rows = np.flatnonzero(train)
    np.minimum.at(in_train, same[rows], rows)
    found = np.full(len(same), none)
    for one, other in (near[:2], near[1::-1]):
        np.minimum.at(found, one, in_train[other])
    return np.where(found == none, -1, found)[same]


def conflicting(asked: Keys, normalised: Keys, ignore: int, train: Mask, test: Mask, lister: Lister) -> dict[str, Any]:
    """Count prompts with more than one answer.

    Args:
        asked: (N,) hash of the normalised prompt.
        normalised: (N,) hash of normalised prompt and answer.
        ignore: Hash of the prompt that is none.
        train: (N,) rows of the training split.
        test: (N,) rows of the test split.
        lister: Writes the pairs.
    """
    order = np.lexsort((normalised, asked))
    new_prompt = np.append(True, asked[order][1:] != asked[order][:-1])[: len(order)]
    new_answer = new_prompt | np.append(True, normalised[order][1:] != normalised[order][:-1])[: len(order)]
    starts = np.flatnonzero(new_prompt)
    sizes = np.diff(np.append(starts, len(order)))
    if not len(starts):
        return share(0, 0) | {"prompts": 0, "prompts_in_train_and_test": 0, "pairs": []}
    differ = (np.add.reduceat(new_answer.astype(np.int64), starts) > 1) & (asked[order][starts] != np.uint64(ignore))
    across = np.logical_or.reduceat(train[order], starts) & np.logical_or.reduceat(test[order], starts)
    groups = np.flatnonzero(differ)
    groups = groups[np.argsort(np.minimum.reduceat(order, starts)[groups])]
    members = [np.sort(order[starts[group] : starts[group] + sizes[group]]) for group in groups[:LISTED]]
    first = np.array([rows[0] for rows in members], np.int64)
    second = np.array([rows[normalised[rows] != normalised[rows[0]]][0] for rows in members], np.int64)
    return share(int(sizes[groups].sum()), len(asked)) | {
        "prompts": len(groups),
        "prompts_in_train_and_test": int((differ & across).sum()),
        "pairs": lister.pairs(first, second),
    }


def _excerpts(first: str, second: str) -> tuple[str, str]:
    """Two texts from a little before their first difference, or from the beginning if that is in sight."""
    upto = min(len(first), len(second))
    different = 0 if first == second else next((at for at in range(upto) if first[at] != second[at]), upto)
    start = 0 if max(len(first), len(second)) <= _EXCERPT or different < _EXCERPT // 2 else different - _BEFORE
    return _excerpt(first, start), _excerpt(second, start)


def _excerpt(text: str, start: int) -> str:
    cut = text[start : start + _EXCERPT]
    return ("… " if start else "") + cut + (CUT if start + len(cut) < len(text) else "")
