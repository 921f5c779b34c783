"""Work of the door: opens recipe and teacher, makes, shows or plans rows, and tells how it goes."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, TaskProgressColumn

from lit_llama.console import shown
from lit_llama.errors import UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.folder.publish import encode_json, replace_file, replace_text
from lit_llama.generate.flags import Loading
from lit_llama.generate.rows.attempt import Attempt
from lit_llama.generate.rows.journal import REJECTED_FILE, ROWS_FILE, open_journal
from lit_llama.generate.rows.recipe import Recipe, read_recipe
from lit_llama.generate.rows.run import Limits, RowMaker, Tally
from lit_llama.generate.rows.summary import NGRAM, summarise
from lit_llama.generate.rows.teacher import Teacher
from lit_llama.html import render
from lit_llama.progress import bar, stderr
from lit_llama.text.inspect.report import histogram
from lit_llama.wording import param


def write_report(folder: Path, maker: RowMaker) -> None:
    """Write both into the folder of a run.

    Args:
        folder: It.
        maker: The run, as far as it has come.
    """
    report = summarise(folder, maker)
    replace_file(folder / "report.json", encode_json(report))
    page = render(
        "lit_llama.generate.rows",
        "rows.html.jinja",
        report,
        styles=["rows.css"],
        name=f"{report['recipe']} by {Path(report['teacher']).name}",
        drawn={name: histogram(entry, None) for name, entry in report["lengths"].items()},
        ngram=NGRAM,
    )
    replace_text(folder / "report.html", page)


PLANNED = 32
"""Attempts that a plan is estimated from, unless it is asked for others."""
_SAID_EVERY = 60.0  # seconds
_BAR = 48  # columns of a terminal that a bar and its percentage take


def seconds_of(text: str | None) -> float | None:
    """Parse a time such as 90s, 30m, 2h or 1h30m into seconds.

    Raises:
        UserError: It is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not text.strip() or found is None:
        raise UserError(parameter="max_time", value=text, expected="a time such as 90s, 30m or 2h")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    if not (total := 3600 * hours + 60 * minutes + seconds) > 0:
        raise UserError(parameter="max_time", value=text, expected="more than no time")
    return total


def local_teacher(checkpoint_dir: Path, loading: Loading | None = None) -> Teacher:
    """Open a model of a folder as a teacher.

    Raises:
        CheckpointError: It cannot be used, or does not say how it is asked.
    """
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.rows.teacher import LocalTeacher
    from lit_llama.model.files.checkpoint import fingerprint

    folder = open_folder(checkpoint_dir, loading)
    folder.check_style()
    identity = fingerprint(folder.base)
    if folder.adapted:
        weights = sorted(folder.folder.glob("*.safetensors"))
        identity += "".join(f" {sha256_file(path)}" for path in weights)
    way = folder.loading
    decided = (way.precision, way.quantize, way.prompt_style)
    how = [str(value) for value in decided if value not in (None, "auto")]
    how += [f"kv_cache {way.kv_cache}"] if way.kv_cache != "auto" else []
    how += ["merged"] if way.merge_adapter else []
    return LocalTeacher(llm=folder.load(), name=str(checkpoint_dir), identity=" ".join([identity, *how]))


def open_teacher(
    checkpoint_dir: Path | None,
    endpoint: str | None,
    loading: Loading | None = None,
    *,
    model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    patience: str = "1h",
) -> Teacher:
    """Open the teacher that is named: a folder, or an endpoint; parameters as of the door.

    Raises:
        UserError: Not exactly one is named, or an endpoint with what a folder is loaded with.
    """
    if (checkpoint_dir is None) == (endpoint is None):
        raise UserError(
            f"a teacher is one of {param('checkpoint_dir')} and {param('endpoint')}, found "
            + ("both" if endpoint else "none")
        )
    if checkpoint_dir is not None:
        return local_teacher(checkpoint_dir, loading)
    own, default = loading or Loading(), Loading()
    if told := [field.name for field in fields(Loading) if getattr(own, field.name) != getattr(default, field.name)]:
        raise UserError(
            f"is for a model of {param('checkpoint_dir')}, but the teacher is at {param('endpoint')}", parameter=told[0]
        )
    from lit_llama.generate.rows.remote import RemoteTeacher, Waits

    assert endpoint is not None
    waits = seconds_of(patience)
    assert waits is not None
    return RemoteTeacher(
        endpoint, model=model, key_variable=key_variable, concurrency=concurrency, waits=Waits(patience=waits)
    )


def limits_of(
    recipe: Recipe, *, max_rows: int | None = None, max_tokens: int | None = None, max_time: str | None = None
) -> Limits:
    """Build the limits of a run.

    Raises:
        UserError: A limit is none.
    """
    for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UserError(parameter=name, value=value, expected="1 or more")
    return Limits(rows=max_rows or recipe.rows, tokens=max_tokens, seconds=seconds_of(max_time))


def make_rows(
    recipe: Recipe,
    teacher: Teacher,
    out_dir: Path,
    *,
    limits: Limits,
    seed: int = 1234,
    test_data: Sequence[Path] = (),
) -> Tally:
    """Make rows into a folder, or go on with those that are there.

    Args:
        recipe: How.
        teacher: Who answers.
        out_dir: Gets rows.jsonl, rejected.jsonl, report.html and what a later run needs to go on.
        limits: Where it ends.
        seed: Of all draws.
        test_data: Files whose prompts must not be among the rows.

    Raises:
        DataError: Everything is rejected.
        LockedError: Another run is at work there.
    """
    from lit_llama.generate.rows.make import write_report

    maker = RowMaker(recipe, teacher, seed=seed, test_data=test_data)
    with open_journal(out_dir, maker.identity) as journal:
        before = len(journal.kept) + len(journal.rejected)
        if before:
            stderr().print(
                f"{out_dir}: {before:,} attempts are there, {len(journal.kept):,} of them accepted; going on"
            )
        telling = _Telling(maker, limits)
        try:
            with telling:
                ended = maker.run(journal, limits, telling.tell)
        finally:
            with contextlib.suppress(OSError):
                write_report(out_dir, maker)
        if ended in ("rows", "sources"):
            journal.finish()
    telling.end(_ENDED[ended].format(*maker.left), out_dir)
    return maker.tally


_ENDED = {
    "rows": "all rows are there",
    "tokens": "stopped at the limit of tokens: {0:,} are left, the next answer may take {1:,}; the same command with a "
    "higher one goes on",
    "time": "stopped at the limit of time; the same command goes on",
    "sources": "the sources are used up",
}


class _Telling:
    """Tells on stderr how a run goes: a bar on a terminal; elsewhere, as in a log, a line now and then."""

    def __init__(self, maker: RowMaker, limits: Limits) -> None:
        self._maker, self._console = maker, stderr()
        # It ends with the rows that are wanted, or with the attempts that the sources are good for.
        self._once = maker.last is not None and maker.last < limits.rows
        self._wanted = maker.last if maker.last is not None and self._once else limits.rows
        self._start = self._said = time.monotonic()
        self._before: tuple[int, int] | None = None  # of interrupted runs: what counts below, and tokens
        self._bar = bar(self._console, BarColumn(), TaskProgressColumn(), transient=False)
        self._task = self._bar.add_task("0 rows", total=self._wanted)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    @property
    def _made(self) -> int:
        return self._maker.tally.decided if self._once else self._maker.tally.accepted

    def tell(self, attempt: Attempt) -> None:
        """An attempt was decided."""
        if self._before is None:
            own = self._once or attempt.rejected is None
            self._before = self._made - own, self._maker.tally.tokens - attempt.tokens
        line = self._line()[: max(20, self._console.width - _BAR)]
        self._bar.update(self._task, description=line, completed=self._made)
        if not self._console.is_terminal and time.monotonic() - self._said >= _SAID_EVERY:
            self._said = time.monotonic()
            self._console.print(self._line())

    def _line(self) -> str:
        tally, elapsed = self._maker.tally, max(time.monotonic() - self._start, 1e-9)
        before, tokens = self._before or (self._made, tally.tokens)
        parts = [f"{tally.decided:,} of {self._wanted:,} attempts"] if self._once else []
        parts += [f"{tally.accepted:,} rows" if self._once else f"{tally.accepted:,} of {self._wanted:,} rows"]
        parts += [f"{tally.rejected.total():,} rejected" + (f" ({rejections(tally)})" if tally.rejected else "")]
        parts += [f"{tally.tokens:,} tokens", f"{(tally.tokens - tokens) / elapsed:.0f} tokens/s"]
        if before < self._made < self._wanted:
            left = (self._wanted - self._made) * elapsed / (self._made - before)
            parts.append(f"about {_time(left)} left")
        return ", ".join(parts)

    def end(self, why: str, out_dir: Path) -> None:
        """The last line."""
        self._console.print(f"{self._line()}; {why}")
        self._console.print(
            f"rows: {out_dir / ROWS_FILE}; rejected: {out_dir / REJECTED_FILE}; {out_dir / 'report.html'}"
        )


def rejections(tally: Tally) -> str:
    """Return the rejections by the name of their filter."""
    return ", ".join(f"{name} {count:,}" for name, count in tally.rejected.most_common())


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def preview(recipe: Recipe, teacher: Teacher, count: int, *, seed: int, test_data: Sequence[Path] = ()) -> None:
    """Print the first attempts with their prompts, and what becomes of them; nothing is written.

    Raises:
        UserError: `count` is no number of attempts.
    """
    if count < 1:
        raise UserError(parameter="preview", value=count, expected="1 or more")
    maker = RowMaker(recipe, teacher, seed=seed, test_data=test_data)
    maker.run(None, Limits(rows=count, attempts=count), _print_attempt)
    tally = maker.tally
    why = f": {rejections(tally)}" if tally.rejected else ""
    stderr().print(
        f"{tally.accepted} of {tally.decided} accepted, {tally.rejected.total()} rejected{why}; nothing is kept"
    )


def _print_attempt(attempt: Attempt) -> None:
    lines = [f"--- attempt {attempt.number}: " + ("accepted" if attempt.rejected is None else "rejected")]
    if attempt.rejected is not None:
        lines[0] += f" by {attempt.rejected[0]}: {attempt.rejected[1]}"
    for source, places in attempt.lineage.items():
        lines.append(f"{source}: {', '.join(places)}")
    for column, messages in attempt.prompts.items():
        lines += [f"[{column}] {message['role']}: {message['content']}" for message in messages]
        lines += [f"[{column}] answer: {text}" for text in attempt.texts.get(column, ())]
    lines.append(json.dumps(attempt.row, ensure_ascii=False) if attempt.row else "no row")
    print("\n".join(shown(line, sys.stdout) for line in lines), flush=True)


def plan(
    recipe: Recipe, teacher: Teacher, rows: int, *, seed: int, count: int = PLANNED, test_data: Sequence[Path] = ()
) -> Mapping[str, Any]:
    """Estimate tokens and time of a run from its first attempts, and print it.

    Args:
        recipe: How.
        teacher: Who answers.
        rows: Accepted rows that are wanted.
        seed: Of all draws.
        count: Attempts that are made for it.
        test_data: Files whose prompts must not be among the rows.

    Returns:
        The estimates, None where no attempt was accepted.
    """
    maker = RowMaker(recipe, teacher, seed=seed, test_data=test_data)
    start = time.monotonic()
    maker.run(None, Limits(rows=count, attempts=count))
    elapsed, tally = time.monotonic() - start, maker.tally
    why = f" ({rejections(tally)})" if tally.rejected else ""
    print(f"{tally.decided} attempts: {tally.accepted} accepted, {tally.rejected.total()} rejected{why}")
    if not tally.accepted:
        print(f"none was accepted, so nothing can be said of a run: look at some with {param('preview', 5)}")
        return dict.fromkeys(("rows", "attempts", "tokens", "prompt_tokens", "seconds"))
    attempts = rows * tally.decided / tally.accepted
    if maker.last is not None and maker.last < attempts:
        rows, attempts = round(maker.last * tally.accepted / tally.decided), maker.last
    scale = attempts / tally.decided
    found = {
        "rows": rows,
        "attempts": round(attempts),
        "tokens": round(scale * tally.tokens),
        "prompt_tokens": round(scale * tally.prompt_tokens),
        "seconds": scale * elapsed,
    }
    until = ", with which the sources are used up" if maker.last == attempts else ""
    print(
        f"{rows:,} rows: about {found['attempts']:,} attempts{until}, {found['tokens']:,} tokens of answers and "
        f"{found['prompt_tokens']:,} of prompts, {_time(scale * elapsed)} on this machine; later rows are rejected "
        "more often, as there are more that they may repeat"
    )
    return found


__all__ = ["Limits", "local_teacher", "make_rows", "plan", "preview", "read_recipe", "seconds_of"]
