"""Time and memory of preparing data, side by side with other ways to do it.

python benchmarks/prepare.py --tokenizer_path checkpoints/NAME

Every measurement is a process of its own; rounds are interleaved, so that a busy machine is unjust to all alike. Times
begin when everything is imported.
"""

import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_llama.cli import CLI

Row = dict[str, str]
MAX_SEQ_LENGTH = 2048
_COMMON = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more write go see number no "
    "way could people my than first water been call who oil its now find long down day did get come made may part "
    "over new sound take only little work know place year live me back give most very after thing our just name "
    "good sentence man think say great where help through much before line right too mean old any same tell boy "
    "follow came want show also around form three small set put end does another well large must big even such "
    "because turn here why ask went men read need land different home us move try kind hand picture again change "
    "off play spell air away animal house point page letter mother answer found study still learn should America "
    "world "
)
WORDS = _COMMON.split()


def main(
    *,
    tokenizer_path: Path,
    trl_python: Path | None = None,
    rows: int = 52_000,
    rows_file: Path | None = None,
    rounds: int = 3,
    scale: list[int] | None = None,
    answer_words: int = 60,
    repeated: float = 0.0,
    cases: list[str] | None = None,
    cores: list[int] | None = None,
    out: Path | None = None,
    measure: str | None = None,
    file: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Compare, or with --scale measure ours alone over numbers of rows.

    Args:
        tokenizer_path: A model folder with tokenizer.json (its chat template is not used), or a tokenizer.model, for
            which only ours and the bare library are measured.
        trl_python: Python of an environment with TRL, such as benchmarks/train.py makes; without it that case is left
            out.
        rows: How many to generate.
        rows_file: A JSON array in Alpaca's format, whose rows are repeated with some words exchanged.
        rounds: How often each case is measured; the table shows the fastest and the median.
        scale: Numbers of rows, such as [10000,100000,1000000].
        answer_words: How long generated answers are, on average.
        repeated: Share of generated rows that are the same as an earlier one.
        cases: Only these, by their names in the table.
        cores: Numbers of cores, such as [1,2], on which both executors are compared in place of all else. The CPU time
            is that of the process that reads and writes: with Ray without the workers.
        out: JSON file for all numbers.
        measure: For the processes that this starts: the case to measure.
        file: For them: the rows.
        folder: For them: where to write.
    """
    if measure:
        assert file is not None and folder is not None
        print(json.dumps(_measure(CASES.get(measure) or _on_cores(measure), file, tokenizer_path, folder)))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-") as home:
        made = {count: Path(home) / f"{count}.json" for count in (scale or [rows])}
        for count, path in made.items():
            _generate(path, count, rows_file, answer_words, repeated)
        if cores:
            cases = [f"{executor}, {count} cores" for count in cores for executor in ("local", "ray")]
        if scale:
            cases = cases or ["ours"]
        elif tokenizer_path.suffix == ".model":
            cases = cases or [case for case in CASES if case.startswith("ours") or case == BARE]
        results = _rounds(made, tokenizer_path, Path(home), 1 if scale else rounds, cases, trl_python)
    machine = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "python": platform.python_version()}
    if out:
        out.write_text(json.dumps({"machine": machine, "rows_file": str(rows_file), "results": results}, indent=2))
    _table(results)


def _rounds(
    made: dict[int, Path],
    tokenizer_path: Path,
    home: Path,
    rounds: int,
    wanted: Sequence[str] | None,
    trl_python: Path | None,
) -> list[dict[str, Any]]:
    results = []
    for number in range(rounds):
        for count, file in made.items():
            folder = home / f"{count}-{number}"  # "ours, unchanged" finds what "ours" made
            for case in wanted or [*CASES, *([TRL] if trl_python else [])]:
                paths = {"tokenizer_path": tokenizer_path, "file": file, "folder": folder / re.sub(r"\W+", "_", case)}
                command = [sys.executable, __file__, "--measure", case]
                command += [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
                if case == TRL:
                    script, prompts = Path(__file__).with_name("prepare_trl.py"), _prompts(file)
                    command = [str(trl_python), str(script), *map(str, (prompts, tokenizer_path, paths["folder"]))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{case}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                result = {"case": case, "rows": count, "round": number, **json.loads(done.stdout.splitlines()[-1])}
                print(f"{case}: {result['seconds']:.2f} s", file=sys.stderr)
                results.append(result)
    return results


def _prompts(file: Path) -> Path:
    """The rows as prompt and completion, which is what TRL is given."""
    path = file.with_suffix(".prompts.jsonl")
    if not path.exists():
        with path.open("w", encoding="utf-8") as out:
            for row in json.loads(file.read_text("utf-8")):
                prompt, completion = _texts(row)
                out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def _table(results: list[dict[str, Any]]) -> None:
    base = min((r["seconds"] for r in results if r["case"] == BARE), default=None)
    print(f"{'':34}{'rows':>9}{'best s':>9}{'median s':>10}{'CPU s':>8}{'rows/s':>8}{'peak MB':>9}{'of bare':>9}")
    for case, rows in dict.fromkeys((result["case"], result["rows"]) for result in results):
        runs = [result for result in results if (result["case"], result["rows"]) == (case, rows)]
        best, median = (choose(run["seconds"] for run in runs) for choose in (min, statistics.median))
        busy, memory = min(run["cpu_seconds"] for run in runs), max(run["peak_rss"] for run in runs) / 1e6
        ratio = f"{best / base:9.2f}" if base else ""
        print(f"{case:34}{rows:9}{best:9.2f}{median:10.2f}{busy:8.1f}{rows / best:8.0f}{memory:9.0f}{ratio}")


# Rows


def _generate(path: Path, count: int, rows_file: Path | None, answer_words: int, repeated: float) -> None:
    """Write rows in Alpaca's format, one after the other so that any number fits into memory."""
    draw = random.Random(0)
    given: list[Row] = json.loads(rows_file.read_text("utf-8")) if rows_file else []
    again: list[Row] = []  # some of the rows so far, to be repeated
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            if again and draw.random() < repeated:
                row = draw.choice(again)
            else:
                row = _changed(given[number % len(given)], draw) if given else _drawn(draw, answer_words)
            if repeated and number % 100 == 0:
                again.append(row)
            file.write(",\n" * bool(number) + json.dumps(row, ensure_ascii=False))
        file.write("]\n")


def _drawn(draw: random.Random, answer_words: int) -> Row:
    """Sentences about as long as those of Alpaca."""

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=max(3, int(draw.expovariate(1 / words))))).capitalize() + "."

    return {"instruction": text(12), "input": text(20) if draw.random() < 0.4 else "", "output": text(answer_words)}


def _changed(row: Row, draw: random.Random) -> Row:
    """The row with a tenth of its words exchanged."""
    return {
        name: " ".join(draw.choice(WORDS) if draw.random() < 0.1 else word for word in text.split(" ")) if text else ""
        for name, text in row.items()
    }


# Cases: each imports and prepares, and gives what is timed


def _measure(case: Callable[[Path, Path, Path], Callable[[], object]], *paths: Path) -> dict[str, Any]:
    run = case(*paths)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, busy = time.perf_counter(), time.process_time()
    run()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": busy, "peak_rss": peak, "peak_rss_before": before}


def _ours(
    file: Path, tokenizer_path: Path, folder: Path, near_duplicates: int = 200_000, executor: Any = "local"
) -> Callable[[], object]:
    import datasets  # noqa: F401
    import jinja2  # noqa: F401

    from lit_llama.text.config import PrepareConfig
    from lit_llama.text.pipeline.records import prepare_records

    config = PrepareConfig(
        source=str(file),
        destination_path=folder,
        tokenizer_path=tokenizer_path,
        prompt_style="alpaca",
        max_seq_length=MAX_SEQ_LENGTH,
        split="hash",
        near_duplicates=near_duplicates,
        executor=executor,
    )
    return lambda: prepare_records(config)


def _ours_without_near_duplicates(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
    return _ours(file, tokenizer_path, folder, near_duplicates=0)


def _ours_without_report(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
    from lit_llama.text.pipeline import prepare

    module: Any = prepare
    module.Findings.add = lambda *_: None
    module.write_report = lambda *_, **__: None
    return _ours(file, tokenizer_path, folder)


def _on_cores(name: str) -> Callable[[Path, Path, Path], Callable[[], object]]:
    """Ours with the executor and on the number of cores that a name tells."""
    executor, count = name.removesuffix(" cores").split(", ")

    def case(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(count)])  # the workers of Ray have it from here
        return _ours(file, tokenizer_path, folder, near_duplicates=0, executor=executor)

    return case


def _unchanged(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
    return _ours(file, tokenizer_path, folder.with_name("ours"))


def _texts(row: Row) -> tuple[str, str]:
    """Prompt and answer, as our style renders them."""
    from lit_llama.text.prompts.encode import named_style

    style = named_style("alpaca")
    content = style.user(row["instruction"], row["input"])
    prompt = style.render([{"role": "user", "content": content}], answer=True)
    return "".join(segment.text for segment in prompt), row["output"]


def _bare(file: Path, tokenizer_path: Path, _: Path) -> Callable[[], object]:
    texts = [text for row in json.loads(file.read_text("utf-8")) for text in _texts(row)]
    if tokenizer_path.suffix == ".model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        return lambda: [model.encode(texts[at : at + 4000], num_threads=-1) for at in range(0, len(texts), 4000)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))

    def run() -> None:
        for start in range(0, len(texts), 4000):
            found = tokenizer.encode_batch_fast(texts[start : start + 4000], add_special_tokens=False)
            assert all(encoding.ids for encoding in found)

    return run


def _mapped(batched: bool) -> Callable[[Path, Path, Path], Callable[[], object]]:
    def case(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
        from functools import partial

        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
        end = tokenizer.token_to_id("<|im_end|>") or 2

        def one(row: Any) -> dict[str, list[int]]:
            prompt, answer = (list(tokenizer.encode(text, add_special_tokens=False).ids) for text in _texts(row))
            return {"input_ids": [*prompt, *answer, end], "labels": [-100] * len(prompt) + [*answer, end]}

        def many(rows: Any) -> dict[str, list[list[int]]]:
            columns = zip(rows["instruction"], rows["input"], rows["output"], strict=True)
            pairs = [_texts({"instruction": a, "input": b, "output": c}) for a, b, c in columns]
            prompts, answers = (
                [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
                for texts in zip(*pairs, strict=True)
            )
            both = list(zip(prompts, answers, strict=True))
            return {
                "input_ids": [[*prompt, *answer, end] for prompt, answer in both],
                "labels": [[-100] * len(prompt) + [*answer, end] for prompt, answer in both],
            }

        function: Callable[[Any], Any] = many if batched else one
        return partial(_map, _datasets(), file, folder, function, batched=batched)

    return case


def _chat_template(file: Path, tokenizer_path: Path, folder: Path) -> Callable[[], object]:
    """What TRL's SFTTrainer does with prompt and completion: both rendered and encoded, then the prompt alone."""
    from transformers import AutoTokenizer

    from lit_llama.text.prompts.encode import named_style

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.chat_template = named_style("alpaca").jinja(bos=False)

    def one(row: Any) -> dict[str, list[int]]:
        content = row["instruction"] + ("\n\n### Input:\n" + row["input"] if row["input"] else "")
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    datasets = _datasets()
    return lambda: _map(datasets, file, folder, one, batched=False)


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    return datasets


def _map(datasets: Any, file: Path, folder: Path, function: Callable[[Any], Any], *, batched: bool) -> None:
    """From the file to a saved data set with two splits, without its cache."""
    raw = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    made = raw.map(function, batched=batched, remove_columns=raw.column_names)
    made.train_test_split(0.05, seed=42).save_to_disk(str(folder / "made"))


BARE, TRL = "encode_batch alone", "TRL's SFTTrainer"
CASES: dict[str, Callable[[Path, Path, Path], Callable[[], object]]] = {
    "ours": _ours,
    "ours, without near-duplicates": _ours_without_near_duplicates,
    "ours, without report": _ours_without_report,
    "ours, unchanged": _unchanged,
    BARE: _bare,
    "datasets.map, batched": _mapped(batched=True),
    "datasets.map, row by row": _mapped(batched=False),
    "apply_chat_template, row by row": _chat_template,
}


if __name__ == "__main__":
    CLI(main)
