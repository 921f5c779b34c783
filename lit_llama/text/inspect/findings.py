"""Findings in the data: duplicates, leakage, contradictions, refusals, damaged text, scripts and lengths.

Rows stream through; of each some 50 bytes stay, and BYTES while near-duplicates are looked for. Two texts are the same
after normalisation if they differ in case, white space or Unicode form (NFKC) alone. A row that says what another one
says, within the data or across the splits, counts under the strictest kind that holds for it.

Shapes: N rows.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_llama.text.config import NEAR_DUPLICATES
from lit_llama.text.dataset.split import normalised
from lit_llama.text.inspect.characters import SCRIPTS, TROUBLE, count_characters
from lit_llama.text.inspect.duplicates import BYTES, SIMILARITY, Keys, NearDuplicates, Pairs, Rows, earliest, partners
from lit_llama.wording import param

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


SHORT = 3  # characters of an answer that is not very short
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)

REFUSALS = (
    # Our own list, in lower case with straight apostrophes. A phrase counts near the beginning of an answer.
    *("as an ai language model", "as an ai model", "as a language model", "as an ai, i", "as an ai assistant, i"),
    *("i'm sorry, but i can", "i am sorry, but i can", "sorry, but i can't", "sorry, but as an ai", "sorry, i can't"),
    *("sorry, i cannot", "sorry, i am unable", "sorry, i'm unable", "sorry, but i am unable", "sorry, but i'm unable"),
    *("i'm not able to help with", "i can't assist with", "i cannot assist with", "i can't help with that"),
    *("i cannot fulfill", "i can't fulfill", "i'm just an ai", "i am just an ai"),
    *("als ki-sprachmodell", "als ki-modell", "als sprachmodell", "es tut mir leid, aber ich kann"),  # German
    *("tut mir leid, aber als ki", "ich kann dabei nicht helfen"),
    *("en tant que modèle de langage", "en tant qu'ia", "je suis désolé, mais je ne peux"),  # French
    *("désolé, mais en tant", "je ne peux pas répondre à cette demande"),
    *("como modelo de lenguaje", "como modelo de linguagem", "como ia,", "lo siento, pero no puedo"),  # es, pt
    *("lo siento, pero como", "desculpe, mas não posso", "desculpe, mas como", "sinto muito, mas não posso"),
    *("come modello linguistico", "mi dispiace, ma non posso", "mi dispiace, ma come"),  # Italian
    *("als ai-taalmodel", "het spijt me, maar ik kan"),  # Dutch
    *("jako model językowy", "przykro mi, ale nie mogę"),  # Polish
    *("как языковая модель", "как искусственный интеллект", "извините, но я не могу", "к сожалению, я не могу"),
    *("bir yapay zeka dil modeli olarak", "üzgünüm, ancak"),  # Turkish
    *("作为一个人工智能", "作为人工智能", "作为一个ai", "作为一名ai", "作为ai语言模型", "作为一个语言模型"),
    *("很抱歉,我无法", "很抱歉,我不能", "抱歉,我无法", "抱歉,我不能", "对不起,我无法", "对不起,我不能"),
    *("aiの言語モデルとして", "ai言語モデルとして", "申し訳ありませんが", "申し訳ございませんが"),  # Japanese
    *("ai 언어 모델로서", "인공지능 언어 모델로서", "죄송하지만", "죄송합니다만"),  # Korean
    *("كنموذج لغوي", "آسف، لكن لا يمكنني", "एक एआई भाषा मॉडल के रूप में", "क्षमा करें, लेकिन मैं"),  # Arabic, Hindi
)
_ASCII_REFUSALS = tuple(phrase for phrase in REFUSALS if phrase.isascii())
_SIGNS = (
    # Each of these phrases holds one: nine answers in ten hold none, and are done with.
    *("model", "sorry, ", "i can", " an ai", "leid, aber", "siento, pero", " hel", "tant qu'ia", "como ia,"),
    *("dispiace", "desculpe", "het spijt"),
)
_OPENING = 200  # characters of an answer where a refusal would stand
_BATCH = 1 << 19  # characters looked at together


class Findings:
    """Findings in the rows that are kept, taken one after the other.

    Args:
        near_duplicates: Rows up to which near-duplicates are looked for; 0 for not at all.
    """

    def __init__(self, *, near_duplicates: int = NEAR_DUPLICATES) -> None:
        self._limit = near_duplicates
        self._near = NearDuplicates(near_duplicates)
        self._pending: list[tuple[str, str]] = []
        self._characters = 0
        self._rows, self._tokens, self._trained = array("q"), array("i"), array("i")
        self._splits: dict[str, int] = {}
        self._split = array("b")
        self._files: dict[str, int] = {}  # what stands before the number in `where`
        self._file, self._number = array("i"), array("q")
        self._exact, self._same, self._asked = array("Q"), array("Q"), array("Q")
        self._answers: dict[str, array[int]] = {name: array("q") for name in ("empty", "short", "refused")}
        self._trouble: dict[str, array[int]] = {name: array("q") for name in TROUBLE}
        self._script: list[npt.NDArray[np.int8]] = []
        self._letters = np.zeros(len(SCRIPTS), np.int64)

    def add(self, row: int, where: str, split: str, prompt: str, answer: str, tokens: int, trained: int) -> None:
        """Take in a row.

        Args:
            row: Its number, by which `result` asks for its text.
            where: What a person calls it, as file:row.
            split: train or test; "" if `assign` will say it.
            prompt: The user's words, without what a prompt style puts around them.
            answer: The answer.
            tokens: Length of the sample.
            trained: How many of them carry loss.
        """
        file = where.rstrip("0123456789")
        digits = where[len(file) :]
        if not digits or len(digits) > 18 or (digits[0] == "0" and digits != "0"):  # would not come back the same
            file, digits = where, "-1"
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._number.append(int(digits))
        self._rows.append(row)
        self._split.append(self._splits.setdefault(split, len(self._splits)))
        self._tokens.append(tokens)
        self._trained.append(trained)
        self._pending.append((prompt, answer))
        self._characters += len(prompt) + len(answer)
        if self._characters >= _BATCH:
            self._take_in()

    def assign(self, split: str, rows: npt.NDArray[np.int64]) -> None:
        """Say of which split rows are that came with none; `rows` are their numbers in the order of arrival."""
        np.frombuffer(self._split, np.int8)[rows] = self._splits.setdefault(split, len(self._splits))

    def result(self, text_of: TextOf | None = None) -> dict[str, Any]:
        """Return everything found, ready for JSON.

        Args:
            text_of: Prompt and answer of a row by its number, for the pairs that are listed; without it they carry no
                text.
        """
        self._take_in()
        exact, same, asked = (np.asarray(keys, np.uint64) for keys in (self._exact, self._same, self._asked))
        split = np.asarray(self._split)
        train, test = (split == self._splits.get(name, -1) for name in ("train", "test"))
        first = earliest(same)
        near = self._near.pairs(first == np.arange(len(first))) if self._near.active else None
        lister, rows = Lister(self._place, text_of), len(split)
        untrained = np.flatnonzero(np.asarray(self._trained) == 0)
        return {
            "rows": rows,
            "splits": {name: self._counts(split == code) for name, code in self._splits.items() if code in split},
            "near_duplicates_checked": near is not None,
            "near_duplicates_limit": self._limit,
            "duplicates": duplicates(exact, first, near, lister),
            "leakage": leakage(exact, same, first, near, train, test, lister),
            "conflicting": conflicting(asked, same, _key(""), train, test, lister),
            "answers": {name: lister.rows(found, rows) for name, found in self._answers.items()},
            "untrained": lister.rows(untrained, rows),
            "encoding": {name: lister.rows(found, rows) for name, found in self._trouble.items()},
            "scripts": self._scripts(lister),
            "lengths": {"tokens": lengths(self._tokens), "trained_tokens": lengths(self._trained)},
            "longest": self._longest(),
            "rules": {"short_is_below": SHORT, "near_is_from": SIMILARITY, "refusal_phrases": list(REFUSALS)},
        }

    def lengths_of(self, split: str) -> npt.NDArray[np.int64]:
        """Return the tokens of each sample of a split, (N,), in the order in which they came."""
        inside = np.asarray(self._split) == self._splits.get(split, -1)
        return np.asarray(self._tokens)[inside].astype(np.int64)

    def _take_in(self) -> None:
        if not self._pending:
            return
        start = len(self._exact)
        texts = []
        for index, (prompt, answer) in enumerate(self._pending, start):
            prompt_, answer_ = normalised(prompt), normalised(answer)
            self._exact.append(_key(prompt, answer))
            self._same.append(_key(prompt_, answer_))
            self._asked.append(_key(prompt_))
            texts.append(f"{prompt_}\n{answer_}")
            for name, holds in (
                ("empty", not answer_),
                ("short", 0 < len(answer_) < SHORT),
                ("refused", refused(answer_)),
            ):
                if holds:
                    self._answers[name].append(index)
        if self._near.active:
            self._near.add(texts)
        letters, trouble = count_characters([f"{prompt}\n{answer}" for prompt, answer in self._pending])
        self._letters += letters.sum(axis=0)
        self._script.append(np.where(letters.any(axis=1), letters.argmax(axis=1), -1).astype(np.int8))
        for name, column in zip(TROUBLE, trouble.T, strict=True):
            self._trouble[name].extend((start + np.flatnonzero(column)).tolist())
        self._pending, self._characters = [], 0

    def _place(self, index: int) -> dict[str, Any]:
        file, number = list(self._files)[self._file[index]], self._number[index]
        where = file if number < 0 else f"{file}{number}"
        return {"row": self._rows[index], "where": where, "split": list(self._splits)[self._split[index]]}

    def _counts(self, inside: Mask) -> dict[str, int]:
        tokens, trained = np.asarray(self._tokens)[inside], np.asarray(self._trained)[inside]
        return {
            "rows": len(tokens),
            "tokens": int(tokens.sum(dtype=np.int64)),
            "trained_tokens": int(trained.sum(dtype=np.int64)),
            "longest": int(tokens.max()),
        }

    def _scripts(self, lister: Lister) -> dict[str, Any]:
        """Letters of each script, and rows by the script that most of their letters are of."""
        script = np.concatenate([np.zeros(0, np.int8), *self._script])
        total = int(self._letters.sum())
        found: dict[str, Any] = {}
        for code in np.argsort(-self._letters, kind="stable"):
            if letters := int(self._letters[code]):
                rows = np.flatnonzero(script == code)
                entry = {"letters": letters, "share_of_letters": letters / total}
                found[SCRIPTS[code]] = entry | lister.rows(rows, len(script), listed=5)
        return {"letters": total, "rows_without_letters": int((script < 0).sum()), "by_script": found}

    def _longest(self) -> list[dict[str, Any]]:
        tokens = np.asarray(self._tokens)
        order = np.argsort(-tokens, kind="stable")[:LISTED].tolist()
        return [self._place(i) | {"tokens": self._tokens[i], "trained_tokens": self._trained[i]} for i in order]


def _key(*texts: str) -> int:
    """8 bytes for texts in this order; 0xFF stands in no UTF-8."""
    data = b"\xff".join(text.encode("utf-8", "surrogatepass") for text in texts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def unchecked(rows: int, limit: int) -> str:
    """Explain why near-duplicates were not looked for, and what would do it.

    Args:
        rows: How many there are.
        limit: Up to how many they were to be looked for.
    """
    why = (
        f"there are {rows:,} rows, more than {param('near_duplicates', limit)}"
        if limit
        else f"{param('near_duplicates')} is 0"
    )
    return f"{why}; {param('near_duplicates', rows)} would take about {max(1, rows * BYTES // 10**6):,} MB of memory"


def refused(answer: str) -> bool:
    """Whether a normalised answer begins as a refusal does."""
    opening = answer[:_OPENING].replace("’", "'")
    holds = opening.__contains__  # mapped and not in a generator, since every row is asked
    if not opening.isascii():
        return True in map(holds, REFUSALS)
    return True in map(holds, _SIGNS) and True in map(holds, _ASCII_REFUSALS)


def lengths(values: Iterable[int]) -> dict[str, Any]:
    """Return percentiles (values that occur) and a histogram of at most 40 bins, bin k from k * width on."""
    given = np.asarray(values, np.int64)
    if not len(given):
        return {"sum": 0, "mean": 0.0, "percentiles": {}, "histogram": {"width": 1, "counts": []}}
    points = np.percentile(given, PERCENTILES, method="inverted_cdf").tolist()
    most = int(given.max()) + 1
    widths = (step * 10**power for power in range(12) for step in (1, 2, 5))
    width = next(width for width in widths if width * 40 >= most)
    names = ["min", *(f"p{point}" for point in PERCENTILES[1:-1]), "max"]
    return {
        "sum": int(given.sum()),
        "mean": float(given.mean()),
        "percentiles": dict(zip(names, points, strict=True)),
        "histogram": {"width": width, "counts": np.bincount(given // width).tolist()},
    }
