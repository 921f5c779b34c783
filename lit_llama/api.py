"""The face for notebooks: each stage as a function, with the checks, defaults and results of its command.

Silent unless asked (`verbose`), and the process stays as it was: generators of random numbers, number of threads,
handlers of signals, environment. What a user can cause is a `UserError`. Imports no torch before it is needed.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llama.console import Talk, talking
from lit_llama.device import Precision, process_kept
from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.loading import Loading
from lit_llama.model.config import GGUFType, LoRAConfig, Onto
from lit_llama.results import Evaluated, Finetuned, GeneratedRows, Merged, Place, Prepared, Result
from lit_llama.settings import check_choice, check_names, names_of, settled, written
from lit_llama.text.dataset.config import PrepareConfig
from lit_llama.train.config import FULL, RunConfig, TrainConfig, usual_steps

if TYPE_CHECKING:
    from lit_llama.generate.llm import LLM

Method = Literal["lora", "full"]
Layout = Literal["hf", "meta", "lit", "gguf"]
_NOT_OF = {"lora": ("dtype",), "full": ("adapter_dir", "lora", "quantize", "strategy")}
"""Settings of a run that a method has not."""


@contextmanager
def _call(verbose: bool | None) -> Iterator[Talk]:
    """Begin a call: what it says is kept, the process is put back."""
    with warnings.catch_warnings():  # in a kernel without ipywidgets tqdm warns of that once, for bars nobody asked for
        warnings.filterwarnings("ignore", message="IProgress not found")
        import_module("tqdm.auto")
    with talking(verbose) as talk, process_kept():
        yield talk


def load(folder: Place, *, verbose: bool | None = None, **settings: Any) -> "LLM":
    """Load a checkpoint folder, or an adapter folder with its base, to generate.

        with lit_llama.load("out/lora/mine") as llm:
            print(llm.generate("What food do llamas eat?"))

    Args:
        folder: What `finetune`, `merge` or `convert` made, or any Hugging Face model folder.
        verbose: Say on stderr what is done; None as `lit_llama.verbose` has it.
        settings: Of `Loading`, such as precision, quantize, prompt_style and base_dir.

    Raises:
        UserError: A setting is unknown or out of its range.
        ResourceError: The quantisation cannot be had here.
        CheckpointError: Something is missing or does not fit.
        IntegrityError: The base or its tokenizer is not the one the adapter was trained on.
    """
    loading = settled(Loading, settings)
    with _call(verbose):
        from lit_llama.generate.llm import open_folder

        return open_folder(Path(folder), loading).load()


def prepare(
    source: Place | Sequence[Place],
    destination_path: Place,
    tokenizer_path: Place,
    *,
    verbose: bool | None = None,
    **settings: Any,
) -> Prepared:
    """Make a data folder of any instruction, chat or text data; nothing is done where it is there already.

        data = lit_llama.prepare("rows.jsonl", "data/mine", "checkpoints/NAME", max_seq_length=512)

    Args:
        source: Files, folders, patterns or data sets of the Hub, one or a list.
        destination_path: Folder to make.
        tokenizer_path: The model folder, a tokenizer.json or a tokenizer.model.
        verbose: As for `load`.
        settings: Of `PrepareConfig`, such as prompt_style, split, test_split_size, overflow and fields.

    Raises:
        UserError: A setting is unknown or out of its range, or two exclude each other.
        DataError: Rows that cannot be used, or too few of them; the message names file:row:field.
        CheckpointError: The tokenizer is missing or unusable, or does not know the tokens of the style.
    """
    folders = {"source": source, "destination_path": destination_path, "tokenizer_path": tokenizer_path}
    config = settled(PrepareConfig, folders | settings)
    with _call(verbose) as talk:
        from lit_llama.text.dataset.records import prepare_records
        from lit_llama.text.inspect.report import REPORT_JSON

        meta = prepare_records(config, plan=usual_steps())
        remarks = [*meta.get("remarks", ()), *_looked_at(config.destination_path / REPORT_JSON)]
        return Prepared(folder=config.destination_path, remarks=tuple(remarks), log=tuple(talk.lines), meta=meta)


def finetune(
    checkpoint_dir: Place | None,
    data_dir: Place,
    out_dir: Place,
    *,
    method: Method = "lora",
    lora: LoRAConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    verbose: bool | None = None,
    **settings: Any,
) -> Finetuned:
    """Fine-tune a checkpoint on a data folder, in this process.

        run = lit_llama.finetune("checkpoints/NAME", "data/mine", "out/lora/mine", train={"epochs": 2})

    Ctrl-C finishes the step, saves a state and raises `Interrupted`; with resume="auto" the call goes on.

    Args:
        checkpoint_dir: Base model, a folder in Hugging Face layout; None where adapter_dir names it.
        data_dir: What `prepare` made.
        out_dir: Folder to make, an adapter folder or, with the method full, a checkpoint folder.
        method: lora trains low-rank adapters, full every weight.
        lora: Shape of the adapter; a dictionary has some of its settings.
        train: Course of the training; a dictionary has some of its settings. With the method full the learning rate is
            2e-5 where none is named.
        verbose: As for `load`.
        settings: Of `RunConfig`, such as precision, quantize, seed, resume and adapter_dir. With plan, plan_memory or
            plan_device nothing is trained, and the result has a plan and no losses.

    Raises:
        UserError: Settings, checkpoint, data or states that do not fit each other.
        LockedError: Another process works in `out_dir`.
        NumericalError: Too many steps in a row were not finite.
        ResourceError: Memory or disk do not do.
        Interrupted: A signal came; the state is saved.
    """
    check_choice("method", method, Method)
    config, full = _run_config(checkpoint_dir, data_dir, out_dir, method, lora, train, settings), method == "full"
    with _call(verbose) as talk:
        from lit_llama.train.method import Full, LoRA
        from lit_llama.train.metrics import read_metrics
        from lit_llama.train.report.run_report import REPORT_JSON
        from lit_llama.train.start import begin

        trained, config = begin(Full(config.dtype) if full else LoRA(config.lora), config)
        if config.only_planned:
            from lit_llama.train.plan_table import plan_run

            plan, remarks = plan_run(trained, config)
            return Finetuned(folder=config.out_dir, remarks=tuple(remarks), log=tuple(talk.lines), plan=plan)
        from lit_llama.train.run import finetune as run

        plan, series = run(trained, config), read_metrics(config.out_dir)
        return Finetuned(
            folder=config.out_dir,
            remarks=tuple(_looked_at(config.out_dir / REPORT_JSON)),
            log=tuple(talk.lines),
            losses=dict(series["loss"]),
            test_losses=dict(series["test_loss"]),
            plan=plan,
        )


def _run_config(
    checkpoint_dir: Place | None,
    data_dir: Place,
    out_dir: Place,
    method: Method,
    lora: LoRAConfig | Mapping[str, Any] | None,
    train: TrainConfig | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> RunConfig:
    """The run of a call, whose groups may be given in part."""
    given = dict(settings) | {"checkpoint_dir": checkpoint_dir, "data_dir": data_dir, "out_dir": out_dir}
    if lora is not None:
        given["lora"] = lora
    if train is not None:
        given["train"] = train
    if wrong := [name for name in _NOT_OF[method] if name in given]:
        other = "full" if method == "lora" else "lora"
        raise UserError(f"{wrong[0]} is a setting of method={other!r}; with method={method!r} leave it out")
    if method == "full":
        if isinstance(train, Mapping):
            check_names(train, names_of(TrainConfig), "a setting of TrainConfig")
        given |= {"train": asdict(FULL) | written(train or {}), "strategy": "ddp"}
    return settled(RunConfig, given)


def merge(
    adapter_dir: Place,
    destination_path: Place,
    *,
    base_dir: Place | None = None,
    format: Literal["hf", "gguf"] = "hf",
    dtype: GGUFType | None = None,
    precision: Precision = "auto",
    onto: Onto | None = None,
    modelfile: bool = False,
    verify: bool = False,
    verbose: bool | None = None,
) -> Merged:
    """Merge an adapter into its base: a plain checkpoint again, or a GGUF file, proven to say the same.

        lit_llama.merge("out/lora/mine", "checkpoints/mine")

    Args:
        adapter_dir: What `finetune` or PEFT made.
        destination_path: Folder to make, or with format="gguf" the file.
        base_dir: Its base model, where it is not found where the adapter says.
        format: hf for a Hugging Face folder, gguf for one file that llama.cpp and Ollama read.
        dtype: Store the weights in this dtype; None for that of the base. For gguf also q8_0, q6_k,
            q5_k_m, q4_k_m and q4_0.
        precision: In which the logits are compared.
        onto: Add the update to the base as it is stored, or to what quantisation leaves of it; None as in the training.
        modelfile: With format="gguf", write a Modelfile for Ollama beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        verbose: As for `load`.

    Raises:
        UserError: Settings that exclude each other, or a destination that is there.
        CheckpointError: The adapter is empty, all zero, or does not fit its base.
        IntegrityError: The base is not the one the adapter was trained on, or the merged model does not carry it.
        ResourceError: Disk or memory is too small, said before anything is written.
    """
    for name, value, kind in (
        ("format", format, Literal["hf", "gguf"]),
        ("dtype", dtype, GGUFType | None),
        ("precision", precision, Precision),
        ("onto", onto, Onto | None),
    ):
        check_choice(name, value, kind)
    adapter, destination, base = Path(adapter_dir), Path(destination_path), _path(base_dir)
    with _call(verbose) as talk:
        from lit_llama.convert.merge import merge as write
        from lit_llama.convert.merge import merge_into_gguf
        from lit_llama.model.adapter import verify_folders

        if verify:
            verify_folders(adapter, base_dir=base)
        if format == "gguf":
            proof = merge_into_gguf(
                adapter,
                destination,
                dtype=dtype,
                precision=precision,
                onto=onto,
                base_dir=base,
                modelfile=modelfile,
            )
        elif modelfile:
            raise UserError("--modelfile is for a model with --format gguf")
        else:
            proof = write(adapter, destination, dtype=dtype, precision=precision, onto=onto, base_dir=base)
        return Merged(folder=destination, log=tuple(talk.lines), proof=proof)


def convert(
    source: Place,
    destination_path: Place,
    *,
    format: Layout = "hf",
    dtype: GGUFType | None = None,
    max_shard_size: str = "5GB",
    num_shards: int = 1,
    resize_vocab: int | None = None,
    rms_norm_eps: float | None = None,
    base_dir: Place | None = None,
    lora_alpha: float = 16,
    modelfile: bool = False,
    verify: bool = False,
    verbose: bool | None = None,
) -> Result:
    """Bring weights from one layout into another, tensor by tensor. The layout of `source` is found out.

        lit_llama.convert("model.gguf", "checkpoints/NAME")

    Args:
        source: A folder of Meta's, of litgpt's or of Hugging Face's, a .pth of lit-llama, a GGUF file, or an adapter.
        destination_path: Folder to make, or with format="gguf" the file.
        format: Layout to write: hf (Hugging Face), meta, lit (lit-llama), gguf (llama.cpp and Ollama).
        dtype: Round all weights to it; None rounds none but quantised ones, which become bfloat16.
        max_shard_size: Most bytes of a safetensors file, such as 200MB, unless one tensor is larger.
        num_shards: Number of consolidated.NN.pth, for format="meta".
        resize_vocab: Rows that embedding and head are to have, where the tokenizer has more tokens.
        rms_norm_eps: Epsilon of the norms of a lit-llama .pth, which does not hold it.
        base_dir: Base model of an adapter of another program, which becomes a PEFT adapter folder.
        lora_alpha: Alpha that a LoRA of lit-llama was trained with, which its file does not hold.
        modelfile: With format="gguf", write a Modelfile for Ollama beside the file.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        verbose: As for `load`.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
        UserError: There is nothing to do, settings exclude each other, or the destination is whole already.
        ResourceError: The disk has no room.
    """
    check_choice("format", format, Layout)
    check_choice("dtype", dtype, GGUFType | None)
    found, destination, base = Path(source), Path(destination_path), _path(base_dir)
    with _call(verbose) as talk:
        from lit_llama.convert import convert as write
        from lit_llama.convert import convert_adapter
        from lit_llama.model.adapter import verify_folders
        from lit_llama.model.weights import parse_size

        adapter = base is not None and format == "hf"
        if verify:
            verify_folders(found if found.is_dir() else None, base if adapter else None, base_dir=base)
        if base is not None and adapter:
            convert_adapter(found, base, destination, lora_alpha)
        else:
            write(
                found,
                destination,
                layout=format,
                dtype=dtype,
                max_shard_size=parse_size(max_shard_size),
                num_shards=num_shards,
                rms_norm_eps=rms_norm_eps,
                resize_vocab=resize_vocab,
                base_dir=base,
                modelfile=modelfile,
            )
        return Result(folder=destination, log=tuple(talk.lines))


def download(
    repo_id: str,
    destination_path: Place | None = None,
    *,
    revision: str | None = None,
    file: str | None = None,
    endpoint: str | None = None,
    verbose: bool | None = None,
) -> Result:
    """Download a model or an adapter from the Hugging Face Hub: only what is needed, checked.

        lit_llama.load(lit_llama.download("HuggingFaceTB/SmolLM2-135M-Instruct"))

    Args:
        repo_id: OWNER/NAME, as in the address of the model's page.
        destination_path: Folder to make; None for checkpoints/NAME.
        revision: A branch, tag or commit; None for the main branch.
        file: A GGUF file of the repository, instead of the model folder; of a model in parts the first.
        endpoint: Address of the Hub; None for HF_ENDPOINT or the public one.
        verbose: As for `load`.

    Raises:
        UserError: There is no such repository, revision or file, or no leave to read it.
        CheckpointError: The repository holds nothing that can be used.
        ResourceError: The network or the disk does not do; the same call goes on.
        IntegrityError: A file arrived damaged.
    """
    with _call(verbose) as talk:
        from lit_llama.convert.hub.download import download as fetch

        made = fetch(repo_id, _path(destination_path), revision=revision, file=file, endpoint=endpoint)
        return Result(folder=made, log=tuple(talk.lines))


def evaluate(
    checkpoint_dir: Place | Sequence[Place] = (),
    data_dir: Place | None = None,
    out_dir: Place | None = None,
    *,
    tasks: Place | Sequence[Place] = (),
    answers: Place | Sequence[Place] = (),
    system: str = "",
    limit: int | None = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
    anew: bool = False,
    sampling: Sampling | None = None,
    loading: Loading | None = None,
    verbose: bool | None = None,
    **settings: Any,
) -> Evaluated:
    """Measure models on the same rows, with intervals; what an earlier call finished is not asked again.

        found = lit_llama.evaluate(["checkpoints/NAME", "out/lora/mine"], "data/mine")
        found.measures["mine"]

    Args:
        checkpoint_dir: Checkpoint and adapter folders; the first is what the others are compared to.
        data_dir: Evaluate on the test split of this data folder.
        out_dir: Where rows, results.json and report.html go; None for out/evaluate/NAME of the data or the tasks.
        tasks: Evaluate on the tasks of these YAML files; regression is a small set of general questions.
        answers: Files of answers to the same rows that count as models.
        system: System message of prompts that have none of their own.
        limit: Only the first rows of each task.
        judge_url: Have a model behind this OpenAI-compatible URL say which of two answers is better; its key is read
            from the environment variable OPENAI_API_KEY.
        judge_model: Name of that model.
        anew: Begin again where the folder holds rows that were made otherwise.
        sampling: How answers are drawn; single settings come first. generation_config.json does not count.
        loading: How all models are loaded; single settings come first.
        verbose: As for `load`.
        settings: Of `Sampling` and `Loading`, such as max_new_tokens and quantize.

    Raises:
        UserError: There is nobody or nothing to evaluate, or rows that are there were made otherwise.
        DataError: Rows cannot be read.
        CheckpointError: A folder cannot be used.
        LockedError: Another process evaluates into the same folder.
    """
    drawing, ways = names_of(Sampling), names_of(Loading)
    check_names(settings, [*drawing, *ways], "a setting of Sampling or Loading")
    drawn = replace(sampling or Sampling(), **_picked(settings, drawing))
    way = settled(Loading, asdict(loading or Loading()) | _picked(settings, ways))
    folders, files = [Path(place) for place in _listed(checkpoint_dir)], [Path(place) for place in _listed(answers)]
    named, data = [os.fspath(place) for place in _listed(tasks)], _path(data_dir)
    with _call(verbose) as talk:
        from lit_llama.generate.evaluate.evaluation import evaluate as run
        from lit_llama.generate.evaluate.evaluation import gather_tasks, place_of_report
        from lit_llama.generate.evaluate.judge import make_judge
        from lit_llama.generate.evaluate.models import open_models

        found = gather_tasks(data, named, files, limit)
        judge = make_judge(judge_url, judge_model, os.environ.get("OPENAI_API_KEY"))
        place = _path(out_dir) or place_of_report(data, named, files)
        models = open_models(folders, way)
        made = run(models, found, drawn, place, answers=files, judge=judge, system=system, anew=anew)
        return Evaluated(folder=place, remarks=tuple(made.results["notes"]), log=tuple(talk.lines), evaluation=made)


def generate_rows(
    recipe: Place,
    out_dir: Place,
    checkpoint_dir: Place | None = None,
    *,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    seeds: Place | None = None,
    documents: Place | Sequence[Place] | None = None,
    parameters: Mapping[str, str] | None = None,
    test_data: Place | Sequence[Place] = (),
    max_rows: int | None = None,
    max_tokens: int | None = None,
    max_time: str | None = None,
    seed: int = 1234,
    verbose: bool | None = None,
    **settings: Any,
) -> GeneratedRows:
    """Make training rows with a model, by a recipe; interrupted, the same call goes on.

        made = lit_llama.generate_rows("paraphrase", "out/rows/mine", "checkpoints/NAME", seeds="rows.jsonl")

    Args:
        recipe: A YAML file, or one that ships, such as self-instruct or paraphrase.
        out_dir: Folder to make, or to go on in.
        checkpoint_dir: The teacher: a checkpoint folder or an adapter folder.
        endpoint: The teacher instead: an API as OpenAI's, with its key in OPENAI_API_KEY.
        endpoint_model: Name of the model there; None for the only one it has.
        seeds: Rows that the recipe's source `seeds` has.
        documents: Files or folders that the recipe's source `documents` has.
        parameters: Of the recipe.
        test_data: Rows whose prompts must not come out.
        max_rows: Rows that are wanted; None for what the recipe says.
        max_tokens: Most tokens of answers.
        max_time: End after this time, such as 90s, 30m or 2h.
        seed: Of all draws.
        verbose: As for `load`.
        settings: Of `Loading`.

    Raises:
        UserError: The recipe cannot be read, or needs what is not given, or not exactly one teacher is named.
        DataError: Everything is rejected.
        LockedError: Another run is at work there.
    """
    loading = settled(Loading, settings)
    with _call(verbose) as talk:
        from lit_llama.generate.rows import make

        read = make.read_recipe(
            os.fspath(recipe),
            seeds=_path(seeds),
            documents=None if documents is None else [os.fspath(place) for place in _listed(documents)],
            parameters=None if parameters is None else dict(parameters),
        )
        limits = make.limits_of(read, max_rows=max_rows, max_tokens=max_tokens, max_time=max_time)
        teacher = make.open_teacher(_path(checkpoint_dir), endpoint, loading, model=endpoint_model)
        tested = [Path(place) for place in _listed(test_data)]
        tally = make.make_rows(read, teacher, Path(out_dir), limits=limits, seed=seed, test_data=tested)
        return GeneratedRows(
            folder=Path(out_dir), log=tuple(talk.lines), accepted=tally.accepted, rejected=dict(tally.rejected)
        )


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _listed(places: Place | Sequence[Place]) -> Sequence[Place]:
    """One place or several, as several."""
    return [places] if isinstance(places, str | os.PathLike) else places


def _picked(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}


def _looked_at(report: Path) -> list[str]:
    """The grave warnings of a report, where there is one."""
    from lit_llama.text.inspect.report import look_at

    return look_at(report) if report.is_file() else []
