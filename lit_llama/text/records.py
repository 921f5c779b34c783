"""Any instruction or chat data -> a data folder, unless that is there already; and what to tell people of it."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import DataError, UserError, check_seed
from lit_llama.lock import reserving
from lit_llama.manifest import check_folder, is_intact, sha256_file
from lit_llama.progress import stderr
from lit_llama.text.dataset import META_FILE
from lit_llama.text.losses import LOST_FILE, keep_long_rows
from lit_llama.text.members import read_members
from lit_llama.text.merges import MERGES_FILES
from lit_llama.text.prepare import Rules, new_encoder, prepare
from lit_llama.text.prompts import TEMPLATE_FILE, StyleName, folder_style, named_style
from lit_llama.text.read.documents import Documents
from lit_llama.text.read.files import UTF8, Dialect
from lit_llama.text.read.reading import OnError, read_conversations
from lit_llama.text.report.findings import unchecked
from lit_llama.text.report.look import look_at
from lit_llama.text.report.notes import noted
from lit_llama.text.report.report import REPORT_HTML, REPORT_JSON
from lit_llama.text.shards import SHARD_FILE, Part, Shards, find_shards, write_shard
from lit_llama.text.special import read_object
from lit_llama.text.splits import choose
from lit_llama.text.styles import PromptStyle
from lit_llama.text.tokenizer import TOKENIZER_FILES, Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary

FIELDS_SAID = {
    "unused": "fields that nothing uses (--fields gives them a place)",
    "written_as_text": "fields that were no text, written as JSON text",
    "left_out": "fields left out, as asked",
}
StyleChoice = StyleName | Literal["chat_template"]
_SHOWN = 8  # places of dropped rows that are spelled on stderr


@reserving
def prepare_records(
    sources: str | Sequence[str],
    destination: Path,
    *,
    tokenizer_path: Path,
    prompt_style: StyleChoice | None,
    rules: Rules,
    fields: Mapping[str, str] = {},
    on_error: OnError = "stop",
    tree: Literal["best", "all"] = "best",
    weights: Sequence[float] | None = None,
    documents: Documents | None = None,
    dialect: Dialect = UTF8,
    split_from: Path | None = None,
    shard: str | None = None,
    shards: str | Sequence[str] | None = None,
    plan: Mapping[str, int] | None = None,
    as_text: bool = False,
    ignore_fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the data folder `destination`; the parameters are those of prepare/records.py and prepare/text.py.

    Nothing is done where the folder was made of the same bytes, tokenizer, style and rules by this same code.

    Returns:
        What stands in meta.json; with `shard`, in shard.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable, or does not know the tokens of the style.
    """
    _check(rules)
    ignore_fields = [name for given in ignore_fields for name in given.split(",")]  # as of a command line
    sources, shards = ([given] if isinstance(given, str) else given or () for given in (sources, shards))
    part = Part.parse(shard) if shard else None
    if part and shards:
        raise UserError("--shard makes one shard and --shards takes all together: give one of them")
    read = partial(
        read_conversations,
        fields=fields,
        on_error=on_error,
        tree=tree,
        seed=rules.seed,
        documents=documents,
        as_text=as_text,
        ignore_fields=ignore_fields,
    )
    reader = read(sources, weights=weights, dialect=dialect)
    choice = choose(rules.split, rules.test_split_size, reader.division, other=split_from is not None)
    rules = replace(rules, split=choice.split, test_split_size=choice.test_split_size)
    if documents == "file" and len(reader.identity()) == 1 and rules.tests:
        raise UserError(
            f"{sources[0]} is one document, which cannot be for training and for testing: name more files, use "
            "--documents paragraph or line, or --test_split_size 0 to train on it alone"
        )
    members = (
        read_members(split_from, lambda source: read([source], dialect=Dialect(dialect.encoding)))
        if split_from
        else None
    )
    made_of: dict[str, Any] = {
        "sources": [list(source) for source in reader.identity()],
        "tokenizer": _tokenizer_files(tokenizer_path),
        "version of this program": _code(),
        "version of a package": _packages(),
        "--documents": documents,
        "--prompt_style": prompt_style,
        **{f"--{name}": value for name, value in asdict(rules).items()},
        "--split_from": members.identity() if members else None,
        "--fields": dict(fields),
        "--ignore_fields": list(ignore_fields),
        "--as_text": as_text,
        "--on_error": on_error,
        "--tree": tree,
        "--weights": list(weights or []),
        **{f"--{name}": value for name, value in asdict(dialect).items()},
        "plan of steps": dict(plan or {}),
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    meta = read_object(destination / (SHARD_FILE if part else META_FILE))
    if meta.get("key") == key and _complete(destination, meta) and meta.get("shard") == shard:
        stderr().print(f"{destination}: unchanged, made of the same data by the same rules")
        return meta
    if changes := _changes(meta.get("made_of", {}), made_of):
        stderr().print(f"{destination}: made anew, since {changes}")
    if not part and (destination / SHARD_FILE).exists():
        raise UserError(f"--destination_path {destination} is a shard; name another folder for the data")
    together = Shards(find_shards(shards), key=key, made_of=made_of) if shards else None
    tokenizer = _read_tokenizer(tokenizer_path)
    style = _style(prompt_style, tokenizer_path)
    if prompt_style is None:
        stderr().print(_chosen(style, _folder_of(tokenizer_path)), markup=False)
    if part:
        encoder = new_encoder(tokenizer, style, rules, on_error)
        made = write_shard(reader, encoder, destination, part, key=key, made_of=made_of)
        _shard_summary(destination, made, part)
        return made
    meta = prepare(
        reader,
        destination,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        style=style,
        rules=rules,
        on_error=on_error,
        key=key,
        made_of=made_of,
        members=members,
        shards=together,
        plan=plan,
        commands=_next_commands(destination, tokenizer_path),
        remarks=choice.remarks,
    )
    _summary(destination, meta, tokenizer)
    return meta


def _check(rules: Rules) -> None:
    check_seed(rules.seed)
    if not 3 <= rules.max_seq_length < 2**31:
        raise DataError(f"--max_seq_length is {rules.max_seq_length}, expected 3 or more tokens, below {2**31}")
    if rules.near_duplicates < 0:
        raise UserError(f"--near_duplicates is {rules.near_duplicates}, expected a number of rows, or 0 for none")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was when a folder was made; "" if nothing is known of that."""
    changed = [name for name in now if before and now[name] != before.get(name)]
    flags = [f"{name} is {now[name]}, not {before.get(name)}" for name in changed if name.startswith("--")]
    return ", ".join(flags + [f"the {name} changed" for name in changed if not name.startswith("--")])


def _complete(destination: Path, meta: Mapping[str, Any]) -> bool:
    """Whether all files are there as they were written; somebody may have deleted one."""
    sizes = meta.get("files", {})
    there = bool(sizes) and all(
        (destination / name).is_file() and (destination / name).stat().st_size == size for name, size in sizes.items()
    )
    return there and is_intact(destination)


def _next_commands(destination: Path, tokenizer_path: Path) -> list[str]:
    """What to do with the folder."""
    data, base = (shlex.quote(str(path)) for path in (destination, tokenizer_path))
    show = f"python prepare/show.py --data_dir {data}"
    if not tokenizer_path.is_dir():
        return [show]
    out = shlex.quote(f"out/lora/{destination.name}")
    return [show, f"python finetune/lora.py --checkpoint_dir {base} --data_dir {data} --out_dir {out}"]


def _style(name: StyleChoice | None, tokenizer_path: Path) -> PromptStyle:
    """The style of a name; without one that of the model folder, or Alpaca's where the folder has none."""
    if name not in (None, "chat_template"):
        return named_style(name)
    folder = _folder_of(tokenizer_path)
    style = folder_style(folder)
    if style is None and name is not None:
        raise UserError(f"--prompt_style chat_template: {folder} has no {TEMPLATE_FILE}; name a built-in style")
    return style or named_style("alpaca")


def _folder_of(tokenizer_path: Path) -> Path:
    return tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent


def _chosen(style: PromptStyle, folder: Path) -> str:
    """Which style is taken where none is named."""
    if folder_style(folder) is None:
        return f"prompt style alpaca, as {folder} has no chat template; --prompt_style names another"
    which = "" if style.name == "chat_template" else f", which is {style.name}"
    return f"prompt style: the chat template of {folder}{which}; --prompt_style names another"


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that fits the embedding, where the path is a model folder and so has one."""
    check_folder(_folder_of(path), weights=False)
    tokenizer = Tokenizer.from_path(path)
    rows = read_object(path / "config.json").get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(path, rows, tokenizer)
    if path.is_dir():
        check_recorded(path, tokenizer, path)
    for remark in tokenizer.remarks:
        stderr().print(remark)
    return tokenizer


def _tokenizer_files(path: Path) -> dict[str, str]:
    """Sha256 of all that says how texts are encoded and rendered."""
    folder = path if path.is_dir() else path.parent
    beside = (
        *(*TOKENIZER_FILES, *MERGES_FILES, TEMPLATE_FILE),
        *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    )
    files = {name: sha256_file(folder / name) for name in beside if (folder / name).is_file()}
    return files | {"tokenizer": sha256_file(path) if path.is_file() else ""}


@cache
def _code() -> str:
    """Hash of the files of this package, so that no folder outlives a change of the rules in them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja", ".css"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    """Versions of what encodes and renders: another may give other tokens."""
    found = {}
    for name in ("tokenizers", "sentencepiece", "tiktoken", "jinja2"):
        with suppress(PackageNotFoundError):  # not all are needed
            found[name] = version(name)
    return found


def _summary(destination: Path, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
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
            say(f"  {FIELDS_SAID[what]}: {named}")
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
            say(f"  {name}: no rows, as --test_split_size is 0: finetune trains without evaluation")
            continue
        share = counts["trained_tokens"] / counts["tokens"]
        say(
            f"  {name}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}"
        )
    what = "answers only" if meta["mask_inputs"] else "prompts and answers (--mask_inputs true for answers only)"
    schemas = ", ".join(f"{count} {name}" for name, count in meta["schemas"].items())
    say(f"  recognised: {schemas}; prompt style {meta['prompt_style']}; trained: {what}; ends in {tokenizer.eos}")
    for line in look_at(destination / REPORT_JSON):
        say(f"  {line}")
    say(f"{destination}: look at {REPORT_HTML}; ready for finetune/lora.py --data_dir {shlex.quote(str(destination))}")


def _shard_summary(destination: Path, made: Mapping[str, Any], part: Part) -> None:
    stderr().print(
        f"{destination}: shard {part}, {made['rows']} of {made['of_rows']} rows encoded, {made['tokens']:,} tokens; "
        f"when all {part.of} are made, run the same command with --shards and the folders of all"
    )
