"""Any instruction or chat data -> a data folder, unless that is there already; and what to tell people of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import DataError, UserError
from lit_llama.folder import sha256_file
from lit_llama.progress import stderr
from lit_llama.text.dataset import META_FILE
from lit_llama.text.prepare import Rules, prepare
from lit_llama.text.prompts import TEMPLATE_FILE, StyleName, folder_style, named_style
from lit_llama.text.read.documents import Documents
from lit_llama.text.read.reading import OnError, Reader, read_conversations
from lit_llama.text.report.report import REPORT_HTML
from lit_llama.text.special import read_object
from lit_llama.text.styles import PromptStyle
from lit_llama.text.tokenizer import TOKENIZER_FILES, Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary

StyleChoice = StyleName | Literal["chat_template"]
_SHOWN = 8  # places of dropped rows that are spelled on stderr


def prepare_records(
    sources: Sequence[str],
    destination: Path,
    *,
    tokenizer_path: Path,
    prompt_style: StyleChoice,
    rules: Rules,
    fields: Mapping[str, str] = {},
    on_error: OnError = "stop",
    tree: Literal["best", "all"] = "best",
    weights: Sequence[float] | None = None,
    documents: Documents | None = None,
    plan: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Make the data folder `destination`; the parameters are those of prepare/records.py and prepare/text.py.

    Nothing is done where the folder was made of the same bytes, tokenizer, style and rules by this same code.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable, or does not know the tokens of the style.
    """
    if rules.max_seq_length < 3:
        raise DataError(f"--max_seq_length is {rules.max_seq_length}, expected 3 or more tokens")
    if rules.split == "hash" and not 0 < rules.test_split_size < 1:
        raise UserError(
            f"--test_split_size is {rules.test_split_size}, expected a share such as 0.05: a split by hash cannot "
            "have a number of rows, as rows would change sides when others are added (--split shuffle can)"
        )
    reader = read_conversations(
        sources,
        fields=fields,
        on_error=on_error,
        tree=tree,
        weights=weights,
        seed=rules.seed,
        documents=documents,
    )
    if documents == "file" and len(reader.identity()) == 1:
        raise UserError(
            f"{sources[0]} is one document, which cannot be for training and for testing: name more files, or use "
            "--documents paragraph or line"
        )
    chosen = [
        documents,
        prompt_style,
        asdict(rules),
        dict(fields),
        on_error,
        tree,
        list(weights or []),
        dict(plan or {}),
    ]
    key = _key(reader, tokenizer_path, chosen)
    meta = read_object(destination / META_FILE)
    if meta.get("key") == key and _complete(destination, meta):
        stderr().print(f"{destination}: unchanged, made of the same data by the same rules")
        return meta
    tokenizer = _read_tokenizer(tokenizer_path)
    style = _style(prompt_style, tokenizer_path)
    meta = prepare(
        reader,
        destination,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        style=style,
        rules=rules,
        on_error=on_error,
        key=key,
        plan=plan,
        commands=_next_commands(destination, tokenizer_path),
    )
    _summary(destination, meta, tokenizer)
    return meta


def _complete(destination: Path, meta: Mapping[str, Any]) -> bool:
    """Whether all files are there with their sizes; somebody may have deleted one."""
    sizes = meta.get("files", {})
    return bool(sizes) and all(
        (destination / name).is_file() and (destination / name).stat().st_size == size for name, size in sizes.items()
    )


def _next_commands(destination: Path, tokenizer_path: Path) -> list[str]:
    """What to do with the folder."""
    show = f"python prepare/show.py --data_dir {destination}"
    if not tokenizer_path.is_dir():
        return [show]
    tune = f"python finetune/lora.py --checkpoint_dir {tokenizer_path} --data_dir {destination} --out_dir out/lora/"
    return [show, tune + destination.name]


def _style(name: StyleChoice, tokenizer_path: Path) -> PromptStyle:
    if name != "chat_template":
        return named_style(name)
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    style = folder_style(folder)
    if style is None:
        raise UserError(f"--prompt_style chat_template: {folder} has no {TEMPLATE_FILE}; name a built-in style")
    return style


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that fits the embedding, where the path is a model folder and so has one."""
    tokenizer = Tokenizer.from_path(path)
    rows = read_object(path / "config.json").get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(path, rows, tokenizer)
    if path.is_dir():
        check_recorded(path, tokenizer, path)
    for remark in tokenizer.remarks:
        stderr().print(remark, markup=False)
    return tokenizer


def _key(reader: Reader, tokenizer_path: Path, chosen: Sequence[Any]) -> str:
    """Identity of all that decides the contents: raw bytes, tokenizer and template, rules, and this code."""
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    beside = (*TOKENIZER_FILES, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", TEMPLATE_FILE)
    files = {name: sha256_file(folder / name) for name in beside if (folder / name).is_file()}
    files["tokenizer"] = sha256_file(tokenizer_path) if tokenizer_path.is_file() else ""
    parts = [reader.identity(), files, chosen, _code()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    """Hash of the files of this package, so that no folder outlives a change of the rules in them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja", ".css"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _summary(destination: Path, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Where every row went, and what there is now, on stderr."""
    say = stderr().print
    name, rows, dropped = meta["source"]["file"], meta["source"]["rows"], meta["dropped"]
    lost = sum(map(len, dropped.values()))
    say(f"{name}: {rows} rows = {meta['kept']} kept (of them {len(meta['cut'])} cut) + {lost} dropped")
    for reason, places in dropped.items():
        shown = ", ".join(place.removeprefix(f"{name}:") for place in places[:_SHOWN])
        shown += ", ..." if len(places) > _SHOWN else ""
        say(f"  dropped, {reason}: {len(places)} ({shown}; all of them in {META_FILE})", markup=False)
    if lost > rows / 10:
        say(f"  more than a tenth is dropped: raise --max_seq_length ({meta['max_seq_length']}) or see --overflow")
    if meta["turns_cut"]:
        say(f"  {meta['turns_cut']} last turns without an answer were left off")
    if meta["in_parts"]:
        say(f"  {meta['in_parts']} rows became several samples")
    if meta["test_rows_also_in_train"]:
        say(f"  {meta['test_rows_also_in_train']} test rows stand in train too: the test loss will flatter")
    for name, counts in meta["splits"].items():
        share = counts["trained_tokens"] / counts["tokens"]
        say(
            f"  {name}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}"
        )
    what = "answers only" if meta["mask_inputs"] else "prompts and answers (--mask_inputs true for answers only)"
    schemas = ", ".join(f"{count} {name}" for name, count in meta["schemas"].items())
    say(f"  recognised: {schemas}; prompt style {meta['prompt_style']}; trained: {what}; ends in {tokenizer.eos}")
    say(f"{destination}: look at {REPORT_HTML}; ready for finetune/lora.py --data_dir {destination}")
