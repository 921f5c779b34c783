"""Any instruction or chat data -> a data folder, unless that is there already; and what to tell people of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.folder.lock import reserve
from lit_llama.folder.manifest import check_folder, is_intact
from lit_llama.progress import stderr
from lit_llama.text.config import ENCODING, PrepareConfig
from lit_llama.text.dataset.folder import META_FILE
from lit_llama.text.dataset.held_out import read_held_out
from lit_llama.text.dataset.split import choose
from lit_llama.text.inspect.findings import unchecked
from lit_llama.text.inspect.report import REPORT_HTML, REPORT_JSON, look_at, noted
from lit_llama.text.pipeline.encoder import Encoder
from lit_llama.text.pipeline.executors.blocks import Executor, LocalExecutor
from lit_llama.text.pipeline.executors.recipe import (
    Recipe,
    choose_style,
    folder_of,
    new_encoder,
    packages,
    tokenizer_files,
)
from lit_llama.text.pipeline.prepare import prepare
from lit_llama.text.pipeline.reject_log import LOST_FILE, keep_long_rows
from lit_llama.text.prompts.encode import answer_end, folder_style, for_style
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.read.formats.files import Dialect
from lit_llama.text.read.reading import read_conversations
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import read_object
from lit_llama.text.tokenizer.vocabulary import check_recorded, check_vocabulary, text_fields
from lit_llama.wording import call, param

_FIELDS_SAID = {
    "written_as_text": "fields that were no text, written as JSON text",
    "left_out": "fields left out, as asked",
}
_SETTING = "--"  # before settings in meta.json
_SHOWN = 8  # places of dropped rows that are spelled on stderr


def prepare_records(config: PrepareConfig, *, plan: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Make the data folder of a configuration.

    Nothing is done where the folder was made of the same bytes, tokenizer, style and rules by the same version of the
    encoding.

    Args:
        config: What is read, how rows become samples, and where they go.
        plan: For the report: batch_size and micro_batch_tokens to count steps with.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable, or does not know the tokens of the style.
        ClusterError: The cluster is not there, or was lost.
    """
    with reserve(config.destination_path, required=False):
        return _prepare(config, plan)


def _prepare(config: PrepareConfig, plan: Mapping[str, int] | None) -> dict[str, Any]:
    if config.data_kind == "preference":  # prompts are the same for all answers, and each answer is the last one
        config, plan = replace(config, train_on="last"), None
    destination, tokenizer_path, prompt_style = config.destination_path, config.tokenizer_path, config.prompt_style
    ignore_fields = [name for given in config.ignore_fields or () for name in given.split(",")]  # of a command line
    dialect = Dialect(config.encoding, config.quoting, config.escape)
    read = partial(
        read_conversations,
        fields=config.fields or {},
        on_error=config.on_error,
        tree=config.tree,
        seed=config.seed,
        documents=config.documents,
        as_text=config.as_text,
        ignore_fields=ignore_fields,
        data_kind=config.data_kind,
        where=config.where,
    )
    reader = read(config.sources, weights=config.weights, dialect=dialect)
    split_from = config.split_from
    choice = choose(config.split, config.test_split_size, reader.division, other=split_from is not None)
    if config.documents == "file" and len(reader.identity()) == 1 and choice.tests:
        raise UserError(
            f"{config.sources[0]} is one document, which cannot be for training and for testing: name more files, use "
            f"{param('documents', 'paragraph')} or line, or {param('test_split_size', 0)} to train on it alone"
        )
    members = (
        read_held_out(split_from, lambda source: read([source], dialect=Dialect(dialect.encoding), where=None))
        if split_from
        else None
    )
    made_of: dict[str, Any] = {
        "sources": [list(source) for source in reader.identity()],
        "tokenizer": tokenizer_files(tokenizer_path),
        "version of the encoding": ENCODING,
        "version of a package": packages(),
        "plan of steps": dict(plan or {}),
    }
    settings: dict[str, Any] = {
        "documents": config.documents,
        "prompt_style": prompt_style,
        **config.rules(),
        **choice.rules(),
        "split_from": members.identity() if members else None,
        "fields": config.fields or {},
        "ignore_fields": ignore_fields,
        "as_text": config.as_text,
        "on_error": config.on_error,
        "tree": config.tree,
        "weights": config.weights or [],
        **asdict(dialect),
    }
    if config.data_kind != "auto":
        settings["as"] = config.data_kind
    if config.where is not None:
        settings["where"] = config.where
    made_of |= {f"{_SETTING}{name}": value for name, value in settings.items()}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    meta = read_object(destination / META_FILE)
    if meta.get("key") == key and _complete(destination, meta):
        stderr().print(f"{destination}: unchanged, made of the same data by the same rules")
        return meta
    if changes := _changes(meta.get("made_of", {}), made_of):
        stderr().print(f"{destination}: made anew, since {changes}")
    tokenizer = _read_tokenizer(tokenizer_path)
    style = choose_style(prompt_style, tokenizer_path)
    if prompt_style is None:
        stderr().print(_chosen(style, folder_of(tokenizer_path)), markup=False)
    encoder = new_encoder(tokenizer, style, config)
    with _executor(config, encoder) as executor:
        meta = prepare(
            reader,
            config=config,
            choice=choice,
            executor=executor,
            tokenizer=tokenizer,
            style=style,
            key=key,
            made_of=made_of,
            members=members,
            plan=plan,
            commands=[named.strip("`") for named in _next_calls(destination, tokenizer_path, _method(config))],
        )
    _summary(destination, meta, _end(tokenizer, style), _method(config))
    return meta


@contextmanager
def _executor(config: PrepareConfig, encoder: Encoder) -> Iterator[Executor]:
    """Who encodes the rows."""
    if config.executor == "local":
        yield LocalExecutor(encoder)
        return
    from lit_llama.text.pipeline.executors.ray_executor import RayExecutor

    with RayExecutor(Recipe.of(config), config.ray_address) as executor:
        yield executor


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was when a folder was made; "" if nothing is known of that."""
    known = [*now, *(name for name in before if name.startswith(_SETTING) and name not in now)]
    changed = [name for name in known if before and now.get(name) != before.get(name)]
    settings = [
        f"{_named(name)} is {now.get(name)}, not {before.get(name)}" for name in changed if name.startswith(_SETTING)
    ]
    return ", ".join(settings + [f"the {name} changed" for name in changed if not name.startswith(_SETTING)])


def _named(recorded: str) -> str:
    """A setting as it is named in meta.json."""
    name = recorded.removeprefix(_SETTING)
    return param("data_kind" if name == "as" else name)


def _complete(destination: Path, meta: Mapping[str, Any]) -> bool:
    """Whether all files are there as they were written; somebody may have deleted one."""
    sizes = meta.get("files", {})
    there = bool(sizes) and all(
        (destination / name).is_file() and (destination / name).stat().st_size == size for name, size in sizes.items()
    )
    return there and is_intact(destination)


def _next_calls(destination: Path, tokenizer_path: Path, method: str) -> list[str]:
    """What to do with the folder."""
    calls = [call("show_rows", data_dir=destination)]
    if tokenizer_path.is_dir():
        given = {
            "checkpoint_dir": tokenizer_path,
            "data_dir": destination,
            "out_dir": f"out/{method}/{destination.name}",
        }
        calls.append(call("finetune", **given, method=method))
    return calls


def _method(config: PrepareConfig) -> str:
    """The method that is trained on such a folder."""
    return "dpo" if config.data_kind == "preference" else "lora"


def _chosen(style: PromptStyle, folder: Path) -> str:
    """Which style is taken where none is named."""
    if folder_style(folder) is None:
        return f"prompt style alpaca, as {folder} has no chat template; {param('prompt_style')} names another"
    which = "" if style.name == "chat_template" else f", which is {style.name}"
    return f"prompt style: the chat template of {folder}{which}; {param('prompt_style')} names another"


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that fits the embedding, where the path is a model folder and so has one."""
    check_folder(folder_of(path), weights=False)
    tokenizer = Tokenizer.from_path(path)
    rows = text_fields(read_object(path / "config.json")).get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(path, rows, tokenizer)
    if path.is_dir():
        check_recorded(path, tokenizer, path)
    for remark in tokenizer.remarks:
        stderr().print(remark)
    return tokenizer


def _end(tokenizer: Tokenizer, style: PromptStyle) -> str:
    """The token that ends an answer in a style, else a text."""
    guarded = for_style(tokenizer, style)
    return answer_end(style, guarded.bos_token, guarded.eos, guarded.control) or guarded.eos


def _summary(destination: Path, meta: Mapping[str, Any], end: str, method: str) -> None:
    """Where every row went, and what there is now, on stderr."""
    say = stderr().print
    name, rows, dropped = meta["source"]["file"], meta["source"]["rows"], meta["dropped"]
    lost = sum(tally["rows"] for tally in dropped.values())
    say(f"{name}: {rows} rows = {meta['kept']} kept (of them {meta['cut']['rows']} cut) + {lost} dropped")
    for reason, tally in dropped.items():
        shown = ", ".join(place.removeprefix(f"{name}:") for place in tally["first"][:_SHOWN])
        shown += ", ..." if tally["rows"] > _SHOWN else ""
        say(f"  dropped, {reason}: {tally['rows']} ({shown}; all of them in {LOST_FILE})")
    if lost - meta["dropped_by_choice"] > rows / 10:
        hint = keep_long_rows(meta["too_long"], meta["max_seq_length"]) or "the reasons stand above"
        say(f"  more than a tenth is dropped: {hint}")
    for remark in meta["remarks"]:
        say(f"  {remark}")
    for what, fields in meta["fields"].items():
        if fields:
            named = ", ".join(f"{field} ({count} rows)" for field, count in fields.items())
            place = f"fields that nothing uses ({param('fields')} gives them a place)"
            say(f"  {place if what == 'unused' else _FIELDS_SAID[what]}: {named}")
    if meta.get("pairs") is False:
        say(f"  {meta['wanted']} answers are wanted, {meta['unwanted']} are not")
    if meta["turns_cut"]:
        say(f"  {meta['turns_cut']} last turns without an answer were left off")
    if meta["in_parts"]:
        say(f"  {meta['in_parts']} rows became several samples")
    for what, tally in meta["notes"].items():
        shown = ", ".join(place.removeprefix(f"{name}:") for place in tally["first"][:_SHOWN])
        shown += ", ..." if tally["rows"] > _SHOWN else ""
        say(f"  {tally['rows']} rows {noted(what, meta)} ({shown})", markup=False)
    if given := meta.get("split_from"):
        also = f", {given['dropped']} of them dropped" if given["dropped"] else ""
        say(f"  split as in {given['path']}: {given['rows']} rows ask its {given['questions']} test questions{also}")
    if not meta["near_duplicates_checked"]:
        samples = sum(counts["rows"] for counts in meta["splits"].values())
        say(f"  near-duplicates were not looked for: {unchecked(samples, meta['near_duplicates'])}")
    for name, counts in meta["splits"].items():
        if not counts["rows"]:
            say(f"  {name}: no rows, as {param('test_split_size')} is 0: finetune trains without evaluation")
            continue
        share = counts["trained_tokens"] / counts["tokens"]
        say(
            f"  {name}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}"
        )
    what = (
        "answers only"
        if meta["mask_inputs"]
        else f"prompts and answers ({param('mask_inputs', True)} for answers only)"
    )
    schemas = ", ".join(f"{count} {name}" for name, count in meta["schemas"].items())
    say(f"  recognised: {schemas}; prompt style {meta['prompt_style']}; trained: {what}; ends in {end}")
    for line in look_at(destination / REPORT_JSON):
        say(f"  {line}")
    ready = f"ready for {call('finetune', data_dir=destination, method=method, inline=True)}"
    say(f"{destination}: look at {REPORT_HTML}; {ready}")
