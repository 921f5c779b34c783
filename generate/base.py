"""Continue raw text.

python generate/base.py --checkpoint_dir checkpoints/NAME --prompt "Hello, my name is"
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision


def main(
    *,
    checkpoint_dir: Path,
    base_dir: Path | None = None,
    prompt: str = "Hello, my name is",
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
    precision: Precision = "auto",
    quantize: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
) -> None:
    """Stream the continuation of a text to stdout, until a token that ends it or the limit.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        prompt: Text to continue.
        max_new_tokens: Most tokens to make.
        temperature: 0 takes the most likely token, more is more varied.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest most likely tokens that together have this probability.
        seed: Of the draws.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained.
    """
    from lit_llama.generate.decode import check_counts
    from lit_llama.generate.sampling import Sampling

    check_counts(max_new_tokens=max_new_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    from lit_llama.generate.answer import continue_text
    from lit_llama.generate.load import load

    continue_text(
        load(checkpoint_dir, precision=precision, quantize=quantize, base_dir=base_dir),
        prompt,
        max_new_tokens,
        sampling,
    )


if __name__ == "__main__":
    CLI(main)
