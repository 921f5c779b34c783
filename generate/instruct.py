"""Answer one instruction, or every row of a test split or file.

python generate/instruct.py --checkpoint_dir out/lora/NAME --prompt "What food do llamas eat?"
python generate/instruct.py --checkpoint_dir out/lora/NAME --data_dir data/NAME
"""

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import EXAMPLE_PROMPT, Asked, sampling_flags
from lit_llama.model.config import Held
from lit_llama.text.prompts import StyleName


@sampling_flags(max_new_tokens=256)
def main(
    *,
    checkpoint_dir: Path,
    base_dir: Path | None = None,
    system: str = "",
    prompt: str = EXAMPLE_PROMPT,
    input: str = "",
    data_dir: Path | None = None,
    input_file: Path | None = None,
    output_file: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    sampling: Asked,
    overflow: Overflow = "error",
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
    draft_dir: Path | None = None,
    plan: bool = False,
    plan_memory: str | None = None,
) -> None:
    """Put instructions in the style the model was trained with and print the answers.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        system: System message of prompts that have none of their own.
        prompt: The instruction.
        input: What the instruction is about, if it is apart.
        data_dir: Answer the test split of this data folder instead, and measure the answers.
        input_file: Answer every row of this file instead: JSON or JSONL with instruction, input and, to measure,
            output.
        output_file: Write the answers there, one object a line, instead of to stdout.
        limit: Only the first rows.
        batch_size: Rows answered together.
        sampling: How the tokens of answers are drawn.
        overflow: Beyond what the model reads: error refuses; drop_oldest leaves out the oldest turns of a conversation,
            and of an answer that becomes too long the oldest tokens, and says so.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
    """
    from lit_llama.generate.answer import answer
    from lit_llama.generate.evaluate.models import identity
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.plan import print_plan
    from lit_llama.generate.questions import read_questions

    asked = read_questions(
        prompt,
        input,
        data_dir=data_dir,
        input_file=input_file,
        output_file=output_file,
        limit=limit,
        batch_size=batch_size,
    )
    folder = open_folder(checkpoint_dir, prompt_style=prompt_style, base_dir=base_dir)
    folder.check_style(system)
    if plan or plan_memory is not None:
        print_plan(folder.plan(precision=precision, quantize=quantize, max_sequences=batch_size, memory=plan_memory))
        return
    drawn = sampling.over(folder.sampling)
    llm = folder.load(precision=precision, quantize=quantize, max_sequences=batch_size, draft_dir=draft_dir)
    who = identity(folder, precision, quantize) if output_file is not None else None
    answer(llm, asked, drawn, output_file=output_file, system=system, overflow=overflow, identity=who)


if __name__ == "__main__":
    CLI(main)
