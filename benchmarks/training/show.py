"""The result for people: a table, and bars.

Of preferences the table tells samples per second a second time, with the time in which their reference is computed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def table(lines: Sequence[Line]) -> str:
    """Aligned text, a line for each contender."""
    head = (
        f"{'':24}{'samples/s':>10}{'best':>7}{'trained tok/s':>15}{'tokens/s':>10}{'peak GB':>9}{'1st step s':>11}"
        f"{'ours is':>9}{'max d loss':>11}{'mean d':>9}{'held out':>10}"
    )
    referred = any(line["with_reference"] < line["samples"] for line in lines)
    head += f"{'with ref.':>11}" * referred
    rows = [head]
    for line in lines:
        ratio = f"x{line['ours_is_faster_by']:.2f}" if line["ours_is_faster_by"] else ""
        rows.append(
            f"{line['contender']:24}{line['samples']:10.2f}{line['best_samples']:7.2f}{line['trained_tokens']:15.0f}"
            f"{line['tokens']:10.0f}{line['peak_rss'] / 1e9:9.2f}{line['first_step']:11.1f}{ratio:>9}"
            f"{line['loss_largest']:11.1e}{line['loss_mean']:9.1e}{line['loss_held_out']:10.2%}"
            + f"{line['with_reference']:11.2f}" * referred
            + f"{'' if line['comparable'] else '  not comparable'}"
        )
    step, mean, held_out = lines[0]["loss_limits"]
    rows.append(
        f"d loss: distance from our float32 run; at most {step} at a step, {mean} on average and {held_out:.1%} "
        "held out, else a speed is not comparable"
    )
    return "\n".join(rows)


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """Bars of samples per second and of memory, with what ours makes of them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speeds, memories) = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(lines) + 1.6), layout="constrained")
    names = [line["contender"] for line in lines]
    colors = [_color(line) for line in lines]
    for axes, key, unit, label in (
        (speeds, "samples", 1.0, "samples per second"),
        (memories, "peak_rss", 1e9, "peak memory, GB"),
    ):
        values = [line[key] / unit for line in lines]
        axes.barh(names, values, color=colors)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        ratio = "ours_is_faster_by" if key == "samples" else "memory_of_ours"
        for place, (line, value) in enumerate(zip(lines, values, strict=True)):
            note = f" ×{line[ratio]:.1f}" if line[ratio] and line["contender"] != "ours" else ""
            axes.text(value, place, f" {value:.2f}{note}", va="center")
    memories.set_yticklabels([])
    figure.suptitle(title + " (gray: not comparable)" * any(not line["comparable"] for line in lines))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _color(line: Line) -> str:
    if not line["comparable"]:
        return "#b0b0b0"
    return "#1f4e8c" if line["contender"] == "ours" else "#9db8d9"
