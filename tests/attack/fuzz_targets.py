"""Kinds of files that are read, and commands with their flags: what the fuzzer changes, and what it gives that to."""

import io
import itertools
import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from forks import ROOT, become, ended
from meta_files import write as write_meta
from mutations import HOSTILE
from plain import Sizes, random_state, write_sentencepiece
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import ROWS
from world import World

from lit_llama.conversion import _open_file, _open_folder
from lit_llama.conversion.gguf.writer import write_gguf
from lit_llama.errors import UserError
from lit_llama.folder.manifest import MANIFEST, check_folder, write_manifest
from lit_llama.folder.publish import Staging
from lit_llama.generate.evaluate.tasks import read_tasks
from lit_llama.generate.llm import open_folder
from lit_llama.generate.rows.journal import open_journal
from lit_llama.generate.rows.recipe import read_recipe
from lit_llama.generate.store import RowStore
from lit_llama.model.adapters.peft_folder import read_adapter_config, read_adapter_weights
from lit_llama.model.files.checkpoint import load_model
from lit_llama.text.prompts.encode import folder_style
from lit_llama.text.read.reading import read_conversations
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.train.inputs import read_inputs
from lit_llama.train.logs.report.run_report import write_run_report
from lit_llama.train.state import read_record

SECONDS = 20
"""Of the processor, for one case; the slowest take about one."""
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """Files of one kind, and what reads them.

    Args:
        name: For people.
        home: A folder; each case gets a copy.
        files: Those of it that are changed.
        read: Uses the copy.
        share: How many cases, next to other targets.
    """

    name: str
    home: Path
    files: Sequence[str]
    read: Read
    share: int = 4


def targets(world: World) -> Iterator[Target]:
    """All kinds of files, in folders that are read in a moment."""
    home = world.home / "fuzz"
    home.mkdir()
    base = _bare(world.base, home / "model")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.9, "eos_token_id": [2]}))
    (base / "chat_template.jinja").write_text((world.data / "chat_template.jinja").read_text())
    settings = ["config.json", "generation_config.json", "tokenizer_config.json"]
    yield Target("settings of a model", base, settings, _read_model, 9)
    yield Target("tokenizer.json", base, ["tokenizer.json"], _read_tokenizer, 8)
    yield Target("chat template", base, ["chat_template.jinja"], _read_style, 3)
    yield Target("safetensors", base, ["model.safetensors"], _read_weights, 5)
    yield Target("index", _shards(base, home / "shards"), ["model.safetensors.index.json"], _read_weights, 3)
    yield from _foreign(world, base, home)
    yield from _rows(home / "rows")
    yield Target("data folder", _data(world, home), _names(home / "data"), lambda at: _read_data(world, at), 8)
    adapter = _bare(world.adapter, home / "adapter")
    files = ["adapter_config.json", "meta.json", "adapter_model.safetensors", "run.yaml", "report.json", "metrics.csv"]
    yield Target("adapter", adapter, [name for name in files if (adapter / name).exists()], _read_adapter, 8)
    yield Target("manifest", world.data, [MANIFEST], check_folder, 2)
    yield from _journals(world, home)
    yield from _recipes(home)
    yield from _commands(world, home)


def _bare(source: Path, made: Path) -> Path:
    """A copy without its manifest, which would find every change."""
    shutil.copytree(source, made, ignore=shutil.ignore_patterns(MANIFEST, "states", ".*"))
    return made


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _read_model(folder: Path) -> None:
    opened = open_folder(folder)
    opened.plan()
    _open_folder(folder, None, None)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_path(folder)
    ids = tokenizer.encode("Hello <|im_start|> wörld 1234\n\n  x")
    tokenizer.decode(ids)
    tokenizer.fingerprint()


def _read_style(folder: Path) -> None:
    if (style := folder_style(folder)) is not None:
        style.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    open_folder(folder).check_style()


def _read_weights(folder: Path) -> None:
    load_model(folder, "cpu", torch.float32)


def _read_source(path: Path) -> None:
    source = _open_folder(path, None, None) if path.is_dir() else _open_file(path, None, None)
    for name in source.specs:
        source.read(name)


def _shards(base: Path, made: Path) -> Path:
    shutil.copytree(base, made)
    (made / "model.safetensors").rename(made / "model-00001-of-00001.safetensors")
    with safe_open(made / "model-00001-of-00001.safetensors", framework="pt") as file:
        names = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return made


def _foreign(world: World, base: Path, home: Path) -> Iterator[Target]:
    """Weights in the layouts of other programs."""
    (home / "gguf").mkdir()
    write_gguf(_open_folder(base, None, None), home / "gguf" / "model.gguf")
    yield Target("GGUF", home / "gguf", ["model.gguf"], lambda at: _read_source(at / "model.gguf"), 6)
    (home / "vocabulary").mkdir()
    vocabulary = write_sentencepiece(home / "vocabulary")
    meta = write_meta(home / "meta", random_state(Sizes(n_kv_heads=4)), Sizes(n_kv_heads=4), vocabulary)
    yield Target("Meta", meta, ["params.json", "consolidated.00.pth", "tokenizer.model"], _read_source, 6)
    packed = Path(shutil.copytree(base, home / "bin", ignore=shutil.ignore_patterns("*.safetensors")))
    torch.save(load_file(base / "model.safetensors"), packed / "pytorch_model.bin")
    yield Target("torch", packed, ["pytorch_model.bin"], _read_source, 4)
    yield Target("tokenizer.model", home / "vocabulary", ["tokenizer.model"], _read_tokenizer, 4)


def _rows(home: Path) -> Iterator[Target]:
    home.mkdir()
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}] * 3
    made = {
        "rows.json": json.dumps(ROWS[:5]).encode(),
        "rows.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:5]),
        "chats.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in chats),
        "rows.csv": b"instruction,input,output\n" + b"".join(b'"do, %d",,"it ""is"""\n' % n for n in range(5)),
    }
    for name, data in made.items():
        (home / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(ROWS[:9]), home / "rows.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(chats), home / "chats.parquet", compression="zstd", data_page_version="2.0")
    for name in _names(home):
        yield Target(name, home, [name], lambda at, name=name: _read_rows(at / name), 3)
    import datasets

    saved = home.with_name("saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:5])}).save_to_disk(str(saved))
    yield Target("saved data set", saved, _names(saved), _read_rows, 5)


def _read_rows(path: Path) -> None:
    for row in itertools.islice(read_conversations([str(path)], on_error="skip"), 10_000):
        str(row)


def _data(world: World, home: Path) -> Path:
    return _bare(world.data, home / "data")


def _read_data(world: World, folder: Path) -> None:
    inputs = read_inputs(world.base, folder)
    for split in inputs.splits.values():
        split.trained_tokens()
        split.stranger(384)


def _read_adapter(folder: Path) -> None:
    read_adapter_config(folder)
    read_adapter_weights(folder)
    open_folder(folder)
    write_run_report(folder)


def _journals(world: World, home: Path) -> Iterator[Target]:
    states = sorted((world.adapter / "states").glob("step-*"))
    state = Path(shutil.copytree(states[-1], home / "state"))

    def read(at: Path) -> None:
        (at / MANIFEST).unlink()
        write_manifest(at, {})
        read_record(at)

    yield Target("state", state, ["state.json"], read, 5)
    made = home / "journal"
    made.mkdir()
    reply = {"texts": ["x"], "finish_reasons": ["stop"], "tokens": 1, "prompt_tokens": 2}
    meta = {"attempt": 0, "tokens": 1, "prompt_tokens": 2, "columns": {"a": "b"}}
    lines = [{"instruction": "a", "metadata": {**meta, "attempt": n}} for n in (0, 2)]
    (made / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made / "rejected.jsonl").write_text(json.dumps({**meta, "attempt": 1, "filter": "x", "reason": "y"}) + "\n")
    (made / ".answers.jsonl").write_text(json.dumps({"attempt": 5, "column": "a", "reply": reply}) + "\n")
    (made / "state.json").write_text(json.dumps({"recipe": "r", "seed": 1}))

    def go_on(at: Path) -> None:
        with open_journal(at, {"recipe": "r", "seed": 1}):
            pass

    yield Target("journal of rows", made, _names(made), go_on, 5)
    store = home / "store"
    store.mkdir()
    header, key = {"model": "m", "limit": 3}, ("task", "index")
    rows = [{"task": "a", "index": n, "answer": "x"} for n in range(3)]
    (store / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"header": header}, *rows]))

    def evaluate(at: Path) -> None:
        found = RowStore(at / "rows.jsonl", header, key)
        found.add(rows[0])
        found.sort([("a", 0), ("a", 1)])
        found.close()

    yield Target("rows of an evaluation", store, ["rows.jsonl"], evaluate, 3)
    staging = home / "staging"
    staging.mkdir()
    (staging / "x").write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    (staging / Staging.JOURNAL).write_text(f'{{"plan": "p"}}\n{{"file": "x", "sha256": "{digest}"}}\n')
    yield Target("journal of a sum", staging, [Staging.JOURNAL], lambda at: Staging(at).recover("p"), 2)


def _recipes(home: Path) -> Iterator[Target]:
    made = home / "recipes"
    shutil.copytree(ROOT / "lit_llama" / "generate" / "rows" / "recipes", made)
    for path in made.iterdir():
        if path.suffix != ".yaml":
            path.unlink()
    (made / "tasks.yaml").write_text(yaml.safe_dump([{"name": "a", "items": [{"prompt": "p", "expected": "e"}]}]))
    (made / "seeds.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    names = [name for name in _names(made) if name not in ("tasks.yaml", "seeds.jsonl")]

    def read(at: Path) -> None:
        changed = [name for name in names if (at / name).read_bytes() != (made / name).read_bytes()]
        for name in changed:
            read_recipe(at / name)

    yield Target("recipe", made, names, read, 6)
    yield Target("tasks", made, ["tasks.yaml"], lambda at: read_tasks(str(at / "tasks.yaml")), 3)


def _commands(world: World, home: Path) -> Iterator[Target]:
    """Configuration files and flags, through the doors."""
    made = home / "config"
    made.mkdir()
    course = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "sample_prompts": 0}
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}
    config = {"checkpoint_dir": str(world.base), "data_dir": str(world.data), "out_dir": str(home / "no"), "plan": True}
    config |= {"lora": lora, "train": course, "seed": 1, "precision": "32-true"}
    (made / "lora.yaml").write_text(yaml.safe_dump(config))
    yield Target("--config", made, ["lora.yaml"], lambda at: _door("finetune/lora.py", "--config", at / "lora.yaml"), 5)
    empty = home / "empty"
    empty.mkdir()
    for door, flags in _flags(world, home).items():
        yield Target(f"flags of {door}", empty, [], _Flags(door, flags), 3)


def _flags(world: World, home: Path) -> dict[str, dict[str, object]]:
    """Flags of doors with values that are right and quickly done with."""
    rows = home / "rows" / "rows.json"
    sampling = {"--max_new_tokens": 2, "--temperature": 0.5, "--top_k": 2, "--top_p": 0.9, "--min_p": 0.1, "--seed": 1}
    sampling |= {"--repetition_penalty": 1.1, "--stop": "x", "--num_samples": 1, "--prompt": "a"}
    encoded = {"--tokenizer_path": world.base, "--prompt_style": "alpaca", "--near_duplicates": 0}
    encoded |= {"--max_seq_length": 200, "--test_split_size": 2, "--seed": 1, "--split": "shuffle"}
    course = {"--train.epochs": 1, "--train.batch_size": 4, "--train.learning_rate": 0.001, "--lora.r": 2}
    course |= {"--train.warmup_steps": 1, "--train.micro_batch_tokens": 99, "--lora.alpha": 4, "--lora.dropout": 0.1}
    course |= {"--train.beta1": 0.9, "--train.max_grad_norm": 1, "--train.patience": 2, "--plan": "true", "--seed": 1}
    course |= {"--lora.target_modules": "q_proj", "--devices": 1, "--plan_memory": "1GB", "--train.eval_interval": 3}
    return {
        "generate/base.py": {"--checkpoint_dir": world.base, **sampling},
        "generate/instruct.py": {"--checkpoint_dir": world.adapter, **sampling},
        "finetune/lora.py": {"--checkpoint_dir": world.base, "--data_dir": world.data, **course},
        "prepare/records.py": {"--source": rows, "--destination_path": "OUT", **encoded},
        "prepare/checkpoint.py": {"--source": world.base, "--destination_path": "OUT", "--max_shard_size": "1MB"},
        "finetune/merge.py": {"--adapter_dir": world.adapter, "--destination_path": "OUT", "--dtype": "float16"},
    }


class _Flags:
    """A command with one or two of its values changed; the seed is in the name of the folder that it is given."""

    def __init__(self, door: str, flags: dict[str, object]) -> None:
        self.door, self.flags = door, flags

    def __call__(self, folder: Path) -> None:
        draw = random.Random((folder / "draw").read_text())
        given = {flag: str(value) for flag, value in self.flags.items()}
        for flag in draw.sample(list(given), draw.choice((1, 1, 2))):
            value = draw.choice(HOSTILE)
            given[flag] = value if isinstance(value, str) else json.dumps(value)
        words = [word.replace("\0", "")[:100_000] for pair in given.items() for word in pair]
        _door(self.door, *[str(folder / "made") if word == "OUT" else word for word in words])


def _door(door: str, *words: object) -> None:
    """Run a command as a process of its own; RuntimeError for a traceback, or a status that is none of ours."""
    line = [os.fsdecode(str(word).encode("utf-8", "surrogatepass")) for word in words]
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        os.dup2(writing, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        sys.__stderr__ = sys.stderr = text_file(2)
        become(door, line)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    status = ended(pid)
    if status not in (0, 2, 3, 4, 5, 6, 70) or "Traceback" in said:
        raise RuntimeError(f"status {status}: {door} {' '.join(map(str, words))[:300]}: {said[-500:]}")
    if status:
        last = [line for line in said.splitlines() if line.startswith("error: ")]
        raise UserError(last[-1] if last else "")


def text_file(descriptor: int) -> Any:
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), errors="backslashreplace", write_through=True)
