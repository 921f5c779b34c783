"""Summary of made rows: how many each filter kept, how long and how different they are."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.generate.rows.attempt import prompt_and_answer
from lit_llama.generate.rows.filters import rouge_l, words_of
from lit_llama.generate.rows.journal import REJECTED_FILE, ROWS_FILE
from lit_llama.generate.rows.run import RowMaker
from lit_llama.text.inspect.findings import lengths

NGRAM = 4
_COMPARED, _AMONG = 100, 1000
"""Rows whose likeness is computed, and others that each is compared with, at most."""
_SHOWN, _REASONS, _EXCERPT = 8, 3, 1200
_ASIDE = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "some",
        "any",
        "my",
        "your",
        "our",
        "his",
        "her",
        "its",
        "their",
        "i",
        "you",
        "we",
        "he",
        "she",
        "it",
        "they",
        "me",
        "us",
        "them",
        "of",
        "for",
        "in",
        "on",
        "at",
        "to",
        "from",
        "with",
        "by",
        "and",
        "or",
        "as",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "do",
        "does",
        "did",
        "how",
        "what",
        "which",
        "who",
        "whom",
        "whose",
        "when",
        "where",
        "why",
        "can",
        "could",
        "would",
        "should",
        "will",
        "may",
        "might",
        "must",
        "please",
    ]
)


def summarise(folder: Path, maker: RowMaker) -> dict[str, Any]:
    """Summarise made rows as report.json: nothing of when and how fast, so that equal rows have an equal report."""
    rows = list(_lines(folder / ROWS_FILE))
    sampled = [column.name for column in maker.recipe.columns if column.kind == "sample"]
    rejected = [
        {name: line[name] for name in ("attempt", "filter", "reason")}
        | {"columns": {name: line["columns"][name] for name in sampled if name in line["columns"]}}
        for line in _lines(folder / REJECTED_FILE)
    ]
    texts = [prompt_and_answer(row) for row in rows]
    tally, seeds = maker.tally, _seeds(maker)
    return {
        "recipe": maker.recipe.name,
        "recipe_sha256": maker.recipe.digest,
        "teacher": maker.teacher.name,
        "model_fingerprint": maker.teacher.identity,
        "seed": maker.identity["seed"],
        "attempts": tally.decided,
        "accepted": len(rows),
        "rejected": len(rejected),
        "tokens": tally.tokens,
        "prompt_tokens": tally.prompt_tokens,
        "yield": len(rows) / max(1, tally.decided),
        "tokens_per_row": tally.tokens / max(1, len(rows)),
        "filters": _by_filter(rejected, max(1, tally.decided)),
        "lengths": {
            "prompt": lengths([len(words_of(prompt)) for prompt, _ in texts]),
            "answer": lengths([len(words_of(answer)) for _, answer in texts]),
        },
        "diversity": _diversity([prompt for prompt, _ in texts], seeds),
        "categories": _categories(maker, rows, rejected),
        "samples": [_sample(row) for row in _some(rows, _SHOWN)],
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def _seeds(maker: RowMaker) -> list[str]:
    entries = [entry.value for pool in maker.pools.values() for entry in pool.entries]
    found = [(entry.get("instruction"), entry.get("input")) for entry in entries]
    return ["\n".join(text for text in both if isinstance(text, str) and text) for both in found if any(both)]


def _some(rows: Sequence[Any], count: int) -> list[Any]:
    """So many of them, drawn without a new order."""
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def _by_filter(rejected: Sequence[Mapping[str, Any]], attempts: int) -> list[dict[str, Any]]:
    counts = Counter(line["filter"] for line in rejected)
    found = []
    for name, count in counts.most_common():
        lines = [line for line in rejected if line["filter"] == name]
        examples = [{"attempt": line["attempt"], "reason": line["reason"][:300]} for line in lines[:_REASONS]]
        found.append({"name": name, "rows": count, "share": count / attempts, "examples": examples})
    return found


def _diversity(prompts: Sequence[str], seeds: Sequence[str]) -> dict[str, Any]:
    words = [words_of(prompt) for prompt in prompts]
    pairs = Counter(filter(None, map(_opening, words)))
    made = {gram for text in words for gram in _grams(text)}
    given = {gram for text in seeds for gram in _grams(words_of(text))}
    return {
        "distinct_prompts": len({" ".join(text) for text in words}),
        "distinct_words": len({word for text in words for word in text}),
        "openings": [{"verb": verb, "noun": noun, "rows": count} for (verb, noun), count in pairs.most_common(15)],
        "distinct_openings": len(pairs),
        "new_ngrams": len(made - given) / len(made) if made else 0.0,
        "distinct_ngrams": len(made) / max(1, sum(max(0, len(text) - NGRAM + 1) for text in words)),
        "rouge_rows": _likeness(words, words, itself=True),
        "rouge_seeds": _likeness(words, [words_of(seed) for seed in seeds], itself=False),
    }


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)}


def _opening(words: Sequence[str]) -> tuple[str, str] | None:
    """The first word that says something, mostly a verb, and the next one, mostly its object."""
    telling = [word for word in words if word not in _ASIDE and not re.fullmatch(r"\d+", word)]
    return (telling[0], telling[1]) if len(telling) > 1 else None


def _likeness(words: Sequence[Sequence[str]], others: Sequence[Sequence[str]], *, itself: bool) -> dict[str, Any]:
    """The highest ROUGE-L of rows with any other, in tenths."""
    chosen, among = _some(range(len(words)), _COMPARED), _some(range(len(others)), _AMONG)
    highest = [
        max((rouge_l(words[i], others[j]) for j in among if not (itself and i == j)), default=0.0) for i in chosen
    ]
    counts = Counter(min(9, int(10 * value + 1e-9)) for value in highest) if others else Counter[int]()
    return {"rows": len(chosen) if others else 0, "tenths": [counts[tenth] for tenth in range(10)]}


def _categories(maker: RowMaker, rows: Sequence[Any], rejected: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each sampled column, how often its values were drawn and kept."""
    found = []
    for column in maker.recipe.columns:
        if column.kind != "sample":
            continue
        kept = Counter(str(row["metadata"]["columns"][column.name]) for row in rows)
        lost = Counter(str(line["columns"].get(column.name)) for line in rejected if column.name in line["columns"])
        values = [
            {"value": value, "rows": kept[value], "share": kept[value] / (kept[value] + lost[value])}
            for value in sorted({*kept, *lost}, key=lambda value: (-kept[value], value))
        ]
        found.append({"column": column.name, "values": values[:30], "left_out": max(0, len(values) - 30)})
    return found


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, answer = prompt_and_answer(row)
    meta = row["metadata"]
    columns = {name: _excerpt(value) for name, value in meta["columns"].items()}
    return {
        "attempt": meta["attempt"],
        "prompt": prompt[:_EXCERPT],
        "answer": answer[:_EXCERPT],
        "rejected": str(row.get("rejected", ""))[:_EXCERPT],
        "sources": {name: ", ".join(places) for name, places in meta["sources"].items()},
        "columns": columns,
        "sampling": {name: ", ".join(f"{k} {v}" for k, v in drawn.items()) for name, drawn in meta["sampling"].items()},
    }


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} …"
