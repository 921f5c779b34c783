"""Measure models on the same rows and say which is better, at what, and how certain that is.

python generate/evaluate.py --checkpoint_dir checkpoints/NAME out/lora/NAME --data_dir data/NAME
python generate/evaluate.py --checkpoint_dir checkpoints/NAME out/lora/NAME --tasks regression
"""

import os
from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.flags import Asked, sampling_flags
from lit_llama.model.config import Held
from lit_llama.text.prompts import StyleName


@sampling_flags(samples=False, folders=False, max_new_tokens=256)
def main(
    *,
    checkpoint_dir: list[Path] | None = None,
    answers: list[Path] | None = None,
    data_dir: Path | None = None,
    tasks: list[str] | None = None,
    out_dir: Path | None = None,
    base_dir: Path | None = None,
    system: str = "",
    limit: int | None = None,
    batch_size: int = 32,
    sampling: Asked,
    judge_url: str | None = None,
    judge_model: str | None = None,
    show: int = 0,
    anew: bool = False,
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
) -> None:
    """Ask models for every row, print a table with intervals, and write report.html and results.json.

    What an earlier command finished in the same folder is not asked again.

    Args:
        checkpoint_dir: Checkpoint and adapter folders; the first is what the others are compared to.
        answers: Files of answers to the same rows, as generate/instruct.py writes them, that count as models.
        data_dir: Evaluate on the test split of this data folder.
        tasks: Evaluate on the tasks of these YAML files; regression is a small set of general questions.
        out_dir: Where rows and the report go; out/evaluate/NAME of the data or the tasks if left out.
        base_dir: The base model of adapters, where it is not found where they say.
        system: System message of prompts that have none of their own.
        limit: Only the first rows of each task.
        batch_size: Rows answered together.
        sampling: How the tokens of answers are drawn; what generation_config.json says does not count.
        judge_url: Have a model behind this OpenAI-compatible URL say which of two answers is better; its key is read
            from the environment variable OPENAI_API_KEY.
        judge_model: Name of that model.
        show: Print so many rows on which the models differ, side by side.
        anew: Begin again where the folder holds rows that were made otherwise.
        prompt_style: Ask all models in this style instead of their own.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers of all models in 4 or 8 bits; left out, as each folder says.
    """
    from lit_llama.generate.evaluate.evaluation import evaluate, gather_tasks, place_of_report
    from lit_llama.generate.evaluate.judge import make_judge
    from lit_llama.generate.evaluate.models import open_models
    from lit_llama.generate.evaluate.report.table import print_results, print_rows

    found = gather_tasks(data_dir, tasks or [], answers or [], limit)
    judge = make_judge(judge_url, judge_model, os.environ.get("OPENAI_API_KEY"))
    models = open_models(
        checkpoint_dir or [], prompt_style=prompt_style, base_dir=base_dir, precision=precision, quantize=quantize
    )
    evaluation = evaluate(
        models,
        found,
        sampling.alone(),
        out_dir or place_of_report(data_dir, tasks or [], answers or []),
        answers=answers or [],
        judge=judge,
        system=system,
        batch_size=batch_size,
        anew=anew,
    )
    print_results(evaluation.results)
    print_rows(evaluation.tasks, evaluation.models, show)


if __name__ == "__main__":
    CLI(main)
