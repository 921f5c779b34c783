"""Answer one instruction, or every row of a test split or file.

python generate/instruct.py --checkpoint_dir out/lora/NAME --prompt "What food do llamas eat?"
python generate/instruct.py --checkpoint_dir out/lora/NAME --data_dir data/NAME
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.text.prompts import StyleName


def main(
    *,
    checkpoint_dir: Path,
    base_dir: Path | None = None,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    data_dir: Path | None = None,
    input_file: Path | None = None,
    output_file: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
) -> None:
    """Put instructions in the style the model was trained with and print the answers.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        prompt: The instruction.
        input: What the instruction is about, if it is apart.
        data_dir: Answer the test split of this data folder instead, and measure the answers.
        input_file: Answer every row of this file instead: JSON or JSONL with instruction, input and, to measure,
            output.
        output_file: Write the answers there, one object a line, instead of to stdout.
        limit: Only the first rows.
        batch_size: Rows answered together.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the most likely token, more is more varied.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest most likely tokens that together have this probability.
        seed: Of the draws.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained.
    """
    from lit_llama.errors import UserError
    from lit_llama.generate.decode import check_counts
    from lit_llama.generate.sampling import Sampling

    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, limit=limit)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if data_dir and input_file:
        raise UserError("--data_dir and --input_file are both given, expected one of them")
    from lit_llama.generate.answer import answer_file, answer_one
    from lit_llama.generate.load import load
    from lit_llama.text.formats import Example

    speaker = load(checkpoint_dir, precision=precision, prompt_style=prompt_style, quantize=quantize, base_dir=base_dir)
    if data_dir is None and input_file is None:
        answer_one(speaker, Example(prompt, input), max_new_tokens, sampling)
    else:
        answer_file(
            speaker,
            data_dir=data_dir,
            input_file=input_file,
            output_file=output_file,
            limit=limit,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            batch_size=batch_size,
        )


if __name__ == "__main__":
    CLI(main)
