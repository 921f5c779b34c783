"""Talk to a model, turn after turn.

python generate/chat.py --checkpoint_dir checkpoints/NAME
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
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.9,
    seed: int = 1234,
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
) -> None:
    """Read messages from the terminal, or a line each from a pipe, and stream the answers to stdout.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the most likely token, more is more varied.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest most likely tokens that together have this probability.
        seed: Of the draws.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained.
    """
    from lit_llama.generate.decode import check_counts
    from lit_llama.generate.sampling import Sampling

    check_counts(max_new_tokens=max_new_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    from lit_llama.generate.chat import line_reader, talk
    from lit_llama.generate.load import load

    talk(
        load(checkpoint_dir, precision=precision, prompt_style=prompt_style, quantize=quantize, base_dir=base_dir),
        max_new_tokens,
        sampling,
        line_reader(),
    )


if __name__ == "__main__":
    CLI(main)
