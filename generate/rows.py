"""Make training rows with a model, by a recipe.

python generate/rows.py --recipe self-instruct --seeds seeds.jsonl --checkpoint_dir checkpoints/NAME --preview 5
python generate/rows.py --recipe self-instruct --seeds seeds.jsonl --checkpoint_dir checkpoints/NAME --max_rows 500
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.flags import Loading, loading_flags


@loading_flags(without=["draft_dir", "plan", "plan_memory"])
def main(
    *,
    recipe: str,
    checkpoint_dir: Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    patience: str = "1h",
    out_dir: Path | None = None,
    seeds: Path | None = None,
    documents: list[str] | None = None,
    parameters: dict[str, str] | None = None,
    test_data: list[Path] | None = None,
    preview: int | None = None,
    plan: bool = False,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    max_time: str | None = None,
    seed: int = 1234,
    loading: Loading,
) -> None:
    """Make the rows of a recipe; interrupted, the same command goes on.

    Args:
        recipe: A YAML file, or one that ships: self-instruct, evol-instruct, magpie, answers, paraphrase, best-of-n,
            preference-pairs, questions-from-documents.
        checkpoint_dir: The teacher: a checkpoint folder or an adapter folder.
        endpoint: The teacher instead: an API as OpenAI's, such as http://localhost:8000/v1.
        endpoint_model: Name of the model there; left out, the only one it has.
        key_variable: The environment variable with the key of the endpoint, if it needs one.
        concurrency: Requests that the endpoint gets at the same time.
        patience: How long an endpoint may be down before the run ends; the same command goes on later.
        out_dir: Gets rows.jsonl, rejected.jsonl and report.html. Left out, out/rows/ and the name of the recipe.
        seeds: Rows that the recipe's source `seeds` has, in any format that prepare/records.py reads.
        documents: Files or folders of text, Markdown, HTML or PDF that the recipe's source `documents` has.
        parameters: Of the recipe, as NAME=VALUE.
        test_data: Rows whose prompts must not come out, in any format that prepare/records.py reads.
        preview: Show so many attempts with their prompts and what becomes of them, and write nothing.
        plan: Estimate tokens and time from some attempts, and write nothing.
        max_rows: Rows that are wanted. Left out, what the recipe says.
        max_tokens: Most tokens of answers: no prompt is sent whose longest answer would exceed them.
        max_time: End after this time, such as 90s, 30m or 2h.
        seed: Of all draws.
        loading: How the teacher is loaded.
    """
    from lit_llama.generate.rows import make

    read = make.read_recipe(recipe, seeds=seeds, documents=documents, parameters=parameters)
    limits = make.limits_of(read, max_rows=max_rows, max_tokens=max_tokens, max_time=max_time)
    teacher = make.open_teacher(
        checkpoint_dir,
        endpoint,
        loading,
        model=endpoint_model,
        key_variable=key_variable,
        concurrency=concurrency,
        patience=patience,
    )
    tested = test_data or ()
    if plan:
        make.plan(read, teacher, limits.rows, seed=seed, count=preview or make.PLANNED, test_data=tested)
    elif preview is not None:
        make.preview(read, teacher, preview, seed=seed, test_data=tested)
    else:
        folder = out_dir or Path("out/rows") / read.name
        make.make_rows(read, teacher, folder, limits=limits, seed=seed, test_data=tested)


if __name__ == "__main__":
    CLI(main)
