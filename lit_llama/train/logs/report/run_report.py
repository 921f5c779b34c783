"""Report on a run, for people: report.html, and its numbers in report.json, out of nothing but the run folder."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite, nan
from pathlib import Path
from typing import Any

from lit_llama.conversion.source import SETTINGS_FILE
from lit_llama.errors import IntegrityError
from lit_llama.folder.publish import encode_json, replace_file
from lit_llama.html import Series
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, META_FILE
from lit_llama.model.config import LoRAConfig
from lit_llama.objects import Form, check_form, read_object, read_yaml
from lit_llama.text.dataset.folder import META_FORM
from lit_llama.train.config import FULL, PREFERENCE, RUN_FILE, PreferenceConfig, TrainConfig
from lit_llama.train.logs.metrics import read_metrics, smooth
from lit_llama.train.logs.report.page import render_page
from lit_llama.train.logs.report.warnings import warnings
from lit_llama.train.logs.sampler import SAMPLES_FILE
from lit_llama.wording import call

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
RATES_CSV, RATES = "learning_rates.csv", "-rates"
"""The table of a search for a learning rate, in the folder beside that of the run that has this behind its name."""
FORMAT = 1
_LISTED = 5  # raw files that are named
_COUNTED = {"rows": "rows", "tokens": "tokens", "trained_tokens": "of them trained"}
_PATHS = ("checkpoint_dir", "data_dir", "out_dir")
_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": asdict(LoRAConfig()), "train": asdict(TrainConfig())},
    "dpo": {"lora": asdict(LoRAConfig()), "dpo": asdict(PreferenceConfig()), "train": asdict(PREFERENCE)},
}
"""Defaults of the methods whose results are adapters."""
_OF_PAIRS = (
    "test_accuracy",
    "test_margin",
    "test_chosen_reward",
    "test_rejected_reward",
    "test_drift",
    "answer_length",
)
Json = dict[str, Any]


_SETTINGS_FORM: Form = {
    "train": {"batch_size": int, "max_grad_norm": float, "learning_rate": float, "optimizer": str},
    "lora": dict,
}
_META_FORM: Form = {
    "run": {"method": str, "door": str, "vocab_size": int, "trainable": int, "device": str, "dtype": str, "torch": str},
    "base": {"path": str, "fingerprint": str},
    "data": META_FORM,
    "steps": int,
}


def write_run_report(folder: Path) -> None:
    """Write report.json and report.html of a run that has begun; each is replaced at once, so it can be looked at.

    Read are run.yaml, metrics.csv and, where they are there, timing.csv, samples.jsonl and meta.json.
    """
    settings = read_yaml(folder / RUN_FILE, IntegrityError) if (folder / RUN_FILE).exists() else {}
    meta = read_object(folder / META_FILE, IntegrityError) if (folder / META_FILE).exists() else {}
    check_form(settings, _SETTINGS_FORM, str(folder / RUN_FILE), IntegrityError)
    check_form(meta, _META_FORM, str(folder / META_FILE), IntegrityError)
    series = read_metrics(folder)
    report = run_report(folder, settings, meta, series, _read_samples(folder / SAMPLES_FILE))
    replace_file(folder / REPORT_JSON, encode_json(report))
    replace_file(folder / REPORT_HTML, render_page(report, series).encode())


def run_report(folder: Path, settings: Json, meta: Json, series: Mapping[str, Series], samples: Sequence[Json]) -> Json:
    """Build the contents of report.json."""
    evaluations = _evaluations(series)
    made = meta.get("run", {})
    method = made.get("method") or Path(made.get("door", "lora")).stem  # runs of version 0.1 name a script
    steps = max((step for step, _ in series["step"]), default=0)
    of_steps = meta.get("steps", steps)
    result = (folder / (CONFIG_FILE if method in _ADAPTERS else SETTINGS_FILE)).exists()
    verdict = {
        "steps": steps,
        "of_steps": of_steps,
        "vocabulary": meta.get("run", {}).get("vocab_size"),
        "finished": result and steps >= of_steps,  # a result stays while its run is made longer
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
        "best": min(evaluations, key=lambda row: row["test_loss"]) if evaluations else None,
        "seconds": sum(value for _, value in series["seconds"]),
        "memory": int(max((value for _, value in series["memory"]), default=0)),
        **_speed(series),
    }
    flat = _flat({key: value for key, value in settings.items() if key not in _PATHS})
    known = _ADAPTERS.get(method, {"train": asdict(FULL)})
    defaults = _flat({key: value for key, value in known.items() if key in settings})
    return {
        "format": FORMAT,
        "name": folder.resolve().name,
        "verdict": verdict,
        "warnings": warnings(verdict, series, settings, meta.get("data", {})),
        "evaluations": evaluations,
        "rates": _read_rates(folder),
        "settings": flat,
        "changed": {
            name: defaults[name] for name, value in flat.items() if name in defaults and value != defaults[name]
        },
        "identity": identity(settings, meta),
        "samples": _by_prompt(samples),
        "commands": [
            *_way_on(folder, method, verdict["finished"]),
            *commands(folder, settings, method, _test_rows(meta) != 0),
        ],
    }


def _evaluations(series: Mapping[str, Series]) -> list[Json]:
    """Each evaluation with what else is known of its step; the training loss is the smoothed one.

    What is not finite is left out, as JSON has no word for it.
    """
    known = {name: dict(series[name]) for name in ("epoch", "perplexity", "stopped", "learning_rate", *_OF_PAIRS)}
    known["loss"] = dict(smooth(series["loss"]))
    return [
        {"step": step, "test_loss": loss}
        | {name: values[step] for name, values in known.items() if isfinite(values.get(step, nan))}
        for step, loss in series["test_loss"]
        if isfinite(loss)
    ]


def _read_rates(folder: Path) -> list[Json]:
    """Rates that were compared for the run, the base without any first; of one that diverged the test loss is left out.

    Of a file that is none of ours nothing is taken: no run is to end by what lies beside it.
    """
    folder = folder.resolve()
    path = folder.parent / f"{folder.name}{RATES}" / RATES_CSV
    found = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: float(row[name]) for name in ("loss", "test_loss") if _is_number(row[name])}
                entry = {"learning_rate": float(row["learning_rate"]), "steps": int(row["steps"]), **numbers}
                found.append(entry | {"chosen": row["chosen"] == "yes"})
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return found


def _is_number(text: str) -> bool:
    return text not in ("", "diverged") and isfinite(float(text))


def _speed(series: Mapping[str, Series]) -> Json:
    """Tokens per second over the whole run, trained ones and all, and how many they were."""
    timed = dict(series["seconds"])
    seconds = sum(timed.values())
    counts = {
        name: sum(int(value) for _, value in series[name] if isfinite(value)) for name in ("trained_tokens", "tokens")
    }
    return counts | {f"{name}_per_second": count / seconds if seconds else 0.0 for name, count in counts.items()}


def identity(settings: Json, meta: Json) -> Json:
    """Name the base and the data, with hashes; what is not known is left out."""
    data, run = meta.get("data", {}), meta.get("run", {})
    rows = [
        f"{name} "
        + ", ".join(f"{counts[key]:,} {word}" for key, word in _COUNTED.items() if type(counts.get(key)) is int)
        for name, counts in data.get("splits", {}).items()
    ]
    about = {
        "base": settings.get("checkpoint_dir") or meta.get("base", {}).get("path"),
        "base fingerprint": meta.get("base", {}).get("fingerprint"),
        "data": settings.get("data_dir"),
        "data key": data.get("key"),
        "made of": _files(data.get("source", {})),
        "rows": "; ".join(rows),
        "prompt style": data.get("prompt_style"),
        "tokenizer fingerprint": data.get("tokenizer", {}).get("fingerprint"),
        "trainable parameters": f"{run['trainable']:,}" if "trainable" in run else None,
        "trained on": ", ".join(run[name] for name in ("device", "dtype") if name in run),
        "torch": run.get("torch"),
    }
    return {name: value for name, value in about.items() if value not in (None, "")}


def _files(source: Json) -> str:
    """The raw files, the first of many, with their hashes."""
    files = source.get("files") or ([source] if "file" in source else [])
    named = [f"{file.get('path') or file['file']} (sha256 {file.get('sha256')})" for file in files[:_LISTED]]
    more = [f"and {len(files) - _LISTED:,} more"] if len(files) > _LISTED else []
    return ", ".join(named + more)


def _way_on(folder: Path, method: str, finished: bool) -> list[Json]:
    """The call that continues a run which has not ended."""
    command = call("finetune", config=folder / RUN_FILE, method=method, resume="auto")
    return [] if finished else [{"what": "Go on with it", "command": command.strip("`")}]


def commands(folder: Path, settings: Json, method: str, tested: bool = True) -> list[Json]:
    """List what to do next, with a test split or without one: {"what", "command"}."""
    found = {
        "Repeat the run": call("finetune", config=folder / RUN_FILE, method=method, out_dir=f"{folder}-again"),
        "Talk to it": call("load", folder=folder),
    }
    if method in _ADAPTERS:
        merged = f"checkpoints/{folder.resolve().name}-merged"
        found["Merge it into its base"] = call("merge", adapter_dir=folder, destination_path=merged)
    if "data_dir" in settings and tested:
        found["Answer the test split"] = call("evaluate", checkpoint_dir=folder, data_dir=settings["data_dir"])
    return [{"what": what, "command": command.strip("`")} for what, command in found.items()]


def _test_rows(meta: Json) -> int | None:
    """Rows of the test split, None if that is not known."""
    rows: int | None = meta.get("data", {}).get("splits", {}).get("test", {}).get("rows")
    return rows


def _read_samples(path: Path) -> list[Json]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _by_prompt(rows: Sequence[Json]) -> list[Json]:
    """Each prompt with its answers at the first, the middle and the last evaluation."""
    steps = sorted({row["step"] for row in rows})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    prompts: dict[int, Json] = {}
    for row in rows:
        entry = prompts.setdefault(
            row["row"], {name: row[name] for name in ("row", "prompt", "reference")} | {"answers": []}
        )
        if row["step"] in shown:
            entry["answers"].append({name: row[name] for name in ("step", "answer", "stopped")})
    return list(prompts.values())


def _flat(value: Mapping[str, Any], prefix: str = "") -> Json:
    """Nested settings by dotted names."""
    flat: Json = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(entry, f"{name}.") if isinstance(entry, Mapping) else {name: entry}
    return flat
