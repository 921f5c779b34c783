"""Answer one instruction, or every row of a test split or file.

python generate/instruct.py --checkpoint_dir out/lora/NAME --prompt "What food do llamas eat?"
python generate/instruct.py --checkpoint_dir out/lora/NAME --data_dir data/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from contextlib import nullcontext
from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import EXAMPLE_PROMPT, Asked, Loading, loading_flags, sampling_flags


@sampling_flags(max_new_tokens=256)
@loading_flags()
def main(
    *,
    checkpoint_dir: Path,
    system: str = "",
    prompt: str = EXAMPLE_PROMPT,
    input: str = "",
    data_dir: Path | None = None,
    input_file: Path | None = None,
    output_file: Path | None = None,
    limit: int | None = None,
    sampling: Asked,
    overflow: Overflow = "error",
    loading: Loading,
) -> None:
    """Put instructions in the style the model was trained with and print the answers.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        system: System message of prompts that have none of their own.
        prompt: The instruction.
        input: What the instruction is about, if it is apart.
        data_dir: Answer the test split of this data folder instead, and measure the answers.
        input_file: Answer every row of this file instead: JSON or JSONL with instruction, input and, to measure,
            output.
        output_file: Write the answers there, one object a line, instead of to stdout.
        limit: Only the first rows.
        sampling: How the tokens of answers are drawn.
        overflow: Beyond what the model reads: error refuses; drop_oldest leaves out the oldest turns of a conversation,
            and of an answer that becomes too long the oldest tokens, and says so.
        loading: How the model is loaded.
    """
    from lit_llama.folder.lock import reserve
    from lit_llama.generate.answer import answer
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.models import identity
    from lit_llama.generate.plan import print_plan
    from lit_llama.generate.questions import choose_questions

    asked = choose_questions(
        prompt,
        input,
        checkpoint_dir=checkpoint_dir,
        data_dir=data_dir,
        input_file=input_file,
        output_file=output_file,
        limit=limit,
    )
    folder = open_folder(checkpoint_dir, loading)
    folder.check_style(system)
    if loading.only_planned:
        print_plan(folder.plan())
        return
    drawn = sampling.over(folder.sampling)
    with nullcontext() if output_file is None else reserve(output_file):
        llm = folder.load()
        who = identity(folder) if output_file is not None else None
        answer(llm, asked, drawn, output_file=output_file, system=system, overflow=overflow, identity=who)


if __name__ == "__main__":
    CLI(main)
