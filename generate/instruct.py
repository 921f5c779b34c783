"""Answer one instruction, or every row of a test split or file.

python generate/instruct.py --checkpoint_dir out/lora/NAME --prompt "What food do llamas eat?"
python generate/instruct.py --checkpoint_dir out/lora/NAME --data_dir data/NAME
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.flags import EXAMPLE_PROMPT, Asked, sampling_flags
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
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
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
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained.
    """
    from lit_llama.generate.answer import answer
    from lit_llama.generate.evaluate.models import identity
    from lit_llama.generate.llm import open_folder
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
    drawn = sampling.over(folder.sampling)
    llm = folder.load(precision=precision, quantize=quantize, max_sequences=batch_size)
    who = identity(folder, precision, quantize) if output_file is not None else None
    answer(llm, asked, drawn, output_file=output_file, system=system, identity=who)


if __name__ == "__main__":
    CLI(main)
