"""Measure models on the same rows and say which is better, at what, and how certain that is.

python generate/evaluate.py --checkpoint_dir checkpoints/NAME out/lora/NAME --data_dir data/NAME
python generate/evaluate.py --checkpoint_dir checkpoints/NAME out/lora/NAME --tasks regression
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.flags import Asked, Loading, loading_flags, sampling_flags


@sampling_flags(samples=False, folders=False, max_new_tokens=256)
@loading_flags(without=["draft_dir"])
def main(
    *,
    checkpoint_dir: list[Path] | None = None,
    answers: list[Path] | None = None,
    data_dir: Path | None = None,
    tasks: list[str] | None = None,
    out_dir: Path | None = None,
    system: str = "",
    limit: int | None = None,
    sampling: Asked,
    judge_url: str | None = None,
    judge_model: str | None = None,
    show: int = 0,
    anew: bool = False,
    loading: Loading,
) -> None:
    """Ask models for every row, print a table with intervals, and write report.html and results.json.

    What an earlier command finished in the same folder is not asked again.

    Args:
        checkpoint_dir: Checkpoint and adapter folders; the first is what the others are compared to.
        answers: Files of answers to the same rows, as generate/instruct.py writes them, that count as models.
        data_dir: Evaluate on the test split of this data folder.
        tasks: Evaluate on the tasks of these YAML files; regression is a small set of general questions.
        out_dir: Where rows and the report go; out/evaluate/NAME of the data or the tasks if left out.
        system: System message of prompts that have none of their own.
        limit: Only the first rows of each task.
        sampling: How the tokens of answers are drawn; what generation_config.json says does not count.
        judge_url: Have a model behind this OpenAI-compatible URL say which of two answers is better; its key is read
            from the environment variable OPENAI_API_KEY.
        judge_model: Name of that model.
        show: Print so many rows on which the models differ, side by side.
        anew: Begin again where the folder holds rows that were made otherwise.
        loading: How all of them are loaded.
    """
    from lit_llama.api.stages import evaluate
    from lit_llama.generate.evaluate.page import print_results, print_rows
    from lit_llama.generate.models import open_models
    from lit_llama.generate.plan import print_plan

    if loading.only_planned:
        for model in open_models(checkpoint_dir or [], loading):
            print_plan(model.opened.plan(), model.name)
        return
    made = evaluate(
        checkpoint_dir or [],
        data_dir,
        out_dir,
        tasks=tasks or [],
        answers=answers or [],
        system=system,
        limit=limit,
        judge_url=judge_url,
        judge_model=judge_model,
        anew=anew,
        sampling=sampling.alone(),
        loading=loading,
    )
    print_results(made.results)
    print_rows(made.evaluation.tasks, made.evaluation.models, show)


if __name__ == "__main__":
    CLI(main)
