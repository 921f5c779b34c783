"""Warnings about a run."""

import math
from collections.abc import Mapping
from typing import Any

from lit_llama.html import Series
from lit_llama.train.rate import BOUNDS
from lit_llama.wording import call, param

Json = dict[str, Any]
_ROSE = 1.02  # last test loss / best, from which on the run went on too long
_STOP = 0.5  # share of answers that have to stop by themselves
_CLIPPED = 0.5  # share of steps whose gradients were scaled down
_APART = 2.0  # test loss / training loss at the end
_CHANCE = 0.1  # perplexity / vocabulary, from which on the model is not much better than chance
_UNSURE = 100  # perplexity above this and the square root of the vocabulary is that of no model of a language
_USUAL = {"lora": 1e-2, "full": 1e-3}  # highest learning rates of Adam that are met in practice
_ENDS, _UP = 10, 1.1  # steps at both ends, and how much higher the training loss may be at the last


def warnings(verdict: Mapping[str, Any], series: Mapping[str, Series], settings: Json, data: Json) -> list[Json]:
    """List the warnings, the gravest first: {"severity": "fix" | "check" | "note", "what", "why"}.

    Args:
        verdict: As in report.json.
        series: The columns of metrics.csv.
        settings: What stands in run.yaml.
        data: meta.json of the data.
    """
    found = [*_of_steps(verdict, series, settings), *_of_evaluations(verdict), *_of_sense(verdict, series, settings)]
    if leaked := data.get("test_rows_also_in_train"):
        what = f"{leaked:,} test row{'' if leaked == 1 else 's'} also in train."
        found.append(("check", what, "The test loss looks better than it is; see the report of the data."))
    rows = {name: counts.get("rows") for name, counts in data.get("splits", {}).items()}
    if rows.get("test") == 0:
        what = "The data has no test split: there was no evaluation."
        found.append(("note", what, "Whether the model learned more than its rows by heart is not known."))
    size = settings.get("train", {}).get("batch_size", 0)
    if rows.get("train") and rows["train"] < size:
        what = f"The data has {rows['train']:,} rows for training: a step takes all of them, not {size:,}."
        found.append(("note", what, "So few rows are soon learned by heart."))
    order = ("fix", "check", "note")
    return sorted(
        ({"severity": severity, "what": what, "why": why} for severity, what, why in found),
        key=lambda warning: order.index(warning["severity"]),
    )


def _of_steps(verdict: Mapping[str, Any], series: Mapping[str, Series], settings: Json) -> list[tuple[str, str, str]]:
    found = []
    # Of a step that was skipped, metrics.csv says what went in, and no loss.
    if skipped := sorted({step for step, _ in series["trained_tokens"]} - {step for step, _ in series["loss"]}):
        listed = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        what = f"{_steps(len(skipped))} skipped: loss or gradients were not finite."
        found.append(
            (
                "fix",
                what,
                f"Steps {listed}. A lower {param('train.learning_rate')} or {param('precision', '32-true')} may help.",
            )
        )
    if lost := [step for step, value in series["test_loss"] if not math.isfinite(value)]:
        what = f"The test loss was not finite at step {lost[0]:,}."
        found.append(("fix", what, f"The result cannot be used; lower {param('train.learning_rate')}."))
    limit = settings.get("train", {}).get("max_grad_norm", 0)
    norms = [value for _, value in series["grad_norm"]]
    clipped = sum(value > limit for value in norms) if limit else 0
    if norms and clipped > _CLIPPED * len(norms):
        what = f"Gradients were scaled down in {clipped} of {_steps(len(norms))}."
        found.append(
            (
                "note",
                what,
                f"Lower {param('train.learning_rate')} or raise {param('train.max_grad_norm')} if the loss is uneven.",
            )
        )
    if not verdict["finished"]:
        what = f"The run is at step {verdict['steps']:,} of {verdict['of_steps']:,}: there is no result yet."
        found.append(("note", what, "This page is written anew at evaluations and saves, and every minute."))
    return found


def _of_sense(verdict: Mapping[str, Any], series: Mapping[str, Series], settings: Json) -> list[tuple[str, str, str]]:
    """Numbers that say that the model knows nothing, also where they have fallen."""
    found = []
    rate, kind = settings.get("train", {}).get("learning_rate", 0.0), "lora" if "lora" in settings else "full"
    losses = [value for _, value in series["loss"] if math.isfinite(value)]
    low = rate < BOUNDS[kind][0]  # than any rate that the rule of auto gives
    lower = f"Lower {param('train.learning_rate')}, which is {rate:g}."
    if low:
        lower = f"The learning rate of {rate:g} is low already: look at the rows with {call('show_rows')}."
    first, last = (sum(part) / _ENDS for part in (losses[:_ENDS], losses[-_ENDS:]))
    if len(losses) >= 2 * _ENDS and last > _UP * first:
        found.append(("fix", f"The training loss rose from {first:.4f} to {last:.4f}.", lower))
    perplexity, vocabulary = (verdict["after"] or {}).get("perplexity"), verdict["vocabulary"]
    if verdict["steps"] and perplexity and vocabulary and perplexity > max(_UNSURE, vocabulary**0.5):
        chance = perplexity > _CHANCE * vocabulary
        why = "That is not much better than chance." if chance else "That is far above any language."
        what = f"The perplexity is {perplexity:,.0f}, of a vocabulary of {vocabulary:,} tokens."
        before = (verdict["before"] or {}).get("perplexity")
        way = lower if before is None or perplexity >= before else _learned_little(before, verdict, rate, kind)
        found.append(("fix" if chance else "check", what, f"{why} {way}"))
    adam = "adam" in settings.get("train", {}).get("optimizer", "adamw")
    if adam and rate > _USUAL[kind]:
        what = f"The learning rate of {rate:g} is far above the usual ones, which are below {_USUAL[kind]:g} here."
        found.append(("check", what, "The steps may be too large to learn by; compare with a tenth of it."))
    return found


def _learned_little(before: float, verdict: Mapping[str, Any], rate: float, kind: str) -> str:
    """What to do where the perplexity has fallen, and not far enough: it was no lower rate that it wanted."""
    steps = verdict["steps"]
    fell = f"It was {before:,.0f} before {_steps(steps)}"
    if rate < BOUNDS[kind][0]:
        return f"{fell}: raise {param('train.learning_rate')}, which is {rate:g}, or try auto."
    return f"{fell}: the base knows little of such rows, and needs more of them, or a higher {param('train.epochs')}."


def _of_evaluations(verdict: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after, best = verdict["before"], verdict["after"], verdict["best"]
    found = []
    if after is None or after is before:
        return []
    if after["test_loss"] >= before["test_loss"]:
        found.append(("fix", "The test loss did not fall.", "Nothing was learned that helps on rows it has not seen."))
    elif after["test_loss"] > _ROSE * best["test_loss"]:
        what = f"The test loss was lowest at step {best['step']:,} ({best['test_loss']:.4f}) and has risen since."
        found.append(
            ("check", what, f"From there on the rows were learned by heart; fewer {param('train.epochs')} are better.")
        )
    if "loss" in after and after["test_loss"] > _APART * after["loss"] and after["loss"] > 0:
        times = after["test_loss"] / after["loss"]
        what = f"The test loss is {times:.1f} times the training loss."
        found.append(("check", what, "The model knows the rows of training much better than others like them."))
    if after.get("stopped", 1.0) < _STOP:
        what = f"Only {after['stopped']:.0%} of the sample answers stop by themselves."
        found.append(("check", what, "Long answers that were cut at the limit, or an end that is not learned yet."))
    return found


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"
