"""The stages: prepare rows, fine-tune on them, load and evaluate what came of it, and make new rows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llama.api.results import Evaluated, Finetuned, GeneratedRows, Place, Prepared, called, path_of
from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.flags import Loading
from lit_llama.model.config import LoRAConfig
from lit_llama.settings import check_choice, check_names, names_of, settled, written
from lit_llama.text.config import PrepareConfig
from lit_llama.train.config import FULL, PREFERENCE, PreferenceConfig, RunConfig, TrainConfig, usual_steps
from lit_llama.wording import param

if TYPE_CHECKING:
    from lit_llama.generate.llm import LLM
    from lit_llama.train.rate_search import Found as FoundRate

Method = Literal["lora", "full", "dpo"]
_NOT_OF = {
    "lora": ("dtype", "dpo"),
    "full": ("adapter_dir", "lora", "dpo", "quantize", "strategy"),
    "dpo": ("dtype", "strategy"),
}
"""Settings of a run that a method has not."""
_BEGINS = {"full": FULL, "dpo": PREFERENCE}
"""Courses of methods whose defaults are others."""


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
    with called(verbose) as talk:
        from lit_llama.text.inspect.report import REPORT_JSON
        from lit_llama.text.pipeline.records import prepare_records

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
    dpo: PreferenceConfig | Mapping[str, Any] | None = None,
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
        method: lora trains low-rank adapters, full every weight, dpo adapters on preference data.
        lora: Shape of the adapter; a dictionary has some of its settings.
        dpo: What is learned of preference data, with the method dpo; a dictionary has some of its settings.
        train: Course of the training; a dictionary has some of its settings. With the methods full and dpo the learning
            rate is 2e-5 where none is named, and with dpo there is one epoch.
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
    given = dict(settings) | ({} if dpo is None else {"dpo": dpo})
    config = _run_config(checkpoint_dir, data_dir, out_dir, method, lora, train, given)
    with called(verbose) as talk:
        from lit_llama.train.logs.metrics import read_metrics
        from lit_llama.train.logs.report.run_report import REPORT_JSON
        from lit_llama.train.methods.method import method_of
        from lit_llama.train.start import begin

        trained, config = begin(method_of(method, config), config)
        if config.only_planned:
            from lit_llama.train.memory.plan_table import plan_run

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


def find_learning_rate(
    checkpoint_dir: Place | None,
    data_dir: Place,
    out_dir: Place,
    *,
    lora: LoRAConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    verbose: bool | None = None,
    **settings: Any,
) -> "FoundRate":
    """Compare learning rates of a LoRA run by short runs on its data.

        rate = lit_llama.find_learning_rate("checkpoints/NAME", "data/mine", "out/lora/mine").chosen.rate
        run = lit_llama.finetune("checkpoints/NAME", "data/mine", "out/lora/mine", train={"learning_rate": rate})

    Args:
        checkpoint_dir: As for `finetune`, and so are all others.
        data_dir: It needs a test split.
        out_dir: That of the run; a table and a chart go to OUT-rates beside it.
        lora: Shape of the adapter.
        train: Course of the training.
        verbose: As for `load`.
        settings: Of `RunConfig`.

    Raises:
        UserError: Settings, checkpoint or data that do not fit each other, or with which no rates are compared.
        LockedError: Another process works in the folder of the result.
        NumericalError: All rates diverge.
        ResourceError: Memory or disk do not do.
    """
    config = _run_config(checkpoint_dir, data_dir, out_dir, "lora", lora, train, settings)
    with called(verbose):
        from lit_llama.train.methods.method import method_of
        from lit_llama.train.rate_search import find_learning_rate as search

        return search(method_of("lora", config), config)


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
        other = next(name for name, without in _NOT_OF.items() if wrong[0] not in without)
        raise UserError(
            f"is a setting of {param('method', other)}",
            parameter=wrong[0],
            remedy=f"with {param('method', method)} leave it out",
        )
    if method in _BEGINS:
        if isinstance(train, Mapping):
            check_names(train, names_of(TrainConfig), "a setting of TrainConfig")
        given |= {"train": asdict(_BEGINS[method]) | written(train or {}), "strategy": "ddp"}
    return settled(RunConfig, given)


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
    with called(verbose):
        from lit_llama.generate.llm import open_folder

        return open_folder(Path(folder), loading).load()


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
    named, data = [os.fspath(place) for place in _listed(tasks)], path_of(data_dir)
    with called(verbose) as talk:
        from lit_llama.generate.evaluate.evaluation import evaluate as run
        from lit_llama.generate.evaluate.evaluation import gather_tasks, place_of_report
        from lit_llama.generate.evaluate.judge import make_judge
        from lit_llama.generate.models import open_models
        from lit_llama.model.places import ADAPTER, DATA, MODEL, check_places

        wanted = {"checkpoint_dir": MODEL + ADAPTER, "data_dir": DATA}
        check_places(wanted, {"checkpoint_dir": folders, "data_dir": data})
        found = gather_tasks(data, named, files, limit)
        judge = make_judge(judge_url, judge_model, os.environ.get("OPENAI_API_KEY"))
        place = path_of(out_dir) or place_of_report(data, named, files)
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
    with called(verbose) as talk:
        from lit_llama.generate.rows import make

        read = make.read_recipe(
            os.fspath(recipe),
            seeds=path_of(seeds),
            documents=None if documents is None else [os.fspath(place) for place in _listed(documents)],
            parameters=None if parameters is None else dict(parameters),
        )
        limits = make.limits_of(read, max_rows=max_rows, max_tokens=max_tokens, max_time=max_time)
        teacher = make.open_teacher(path_of(checkpoint_dir), endpoint, loading, model=endpoint_model)
        tested = [Path(place) for place in _listed(test_data)]
        tally = make.make_rows(read, teacher, Path(out_dir), limits=limits, seed=seed, test_data=tested)
        return GeneratedRows(
            folder=Path(out_dir), log=tuple(talk.lines), accepted=tally.accepted, rejected=dict(tally.rejected)
        )


def _listed(places: Place | Sequence[Place]) -> Sequence[Place]:
    """One place or several, as several."""
    return [places] if isinstance(places, str | os.PathLike) else places


def _picked(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in names}


def _looked_at(report: Path) -> list[str]:
    """The grave warnings of a report, where there is one."""
    from lit_llama.text.inspect.report import look_at

    return look_at(report) if report.is_file() else []
