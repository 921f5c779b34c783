"""Continue raw text.

python generate/base.py --checkpoint_dir checkpoints/NAME --prompt "Hello, my name is"
"""

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import Asked, sampling_flags
from lit_llama.model.config import Held


@sampling_flags(max_new_tokens=50)
def main(
    *,
    checkpoint_dir: Path,
    base_dir: Path | None = None,
    prompt: str = "Hello, my name is",
    control_tokens: bool = False,
    sampling: Asked,
    overflow: Overflow = "error",
    precision: Precision = "auto",
    quantize: Held | None = None,
    draft_dir: Path | None = None,
    plan: bool = False,
    plan_memory: str | None = None,
) -> None:
    """Stream the continuation of a text to stdout, until a token that ends it or the limit.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        prompt: Text to continue.
        control_tokens: Make control tokens of those that the prompt spells, such as <|im_start|>, in place of words.
        sampling: How the tokens are drawn.
        overflow: Beyond what the model reads: error refuses; drop_oldest leaves out the oldest tokens, and says so.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
    """
    from lit_llama.generate.answer import continue_text
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.plan import print_plan

    folder = open_folder(checkpoint_dir, base_dir=base_dir)
    if plan or plan_memory is not None:
        print_plan(folder.plan(precision=precision, quantize=quantize, memory=plan_memory))
        return
    drawn = sampling.over(folder.sampling)
    llm = folder.load(precision=precision, quantize=quantize, draft_dir=draft_dir)
    continue_text(llm, prompt, drawn, control_tokens=control_tokens, overflow=overflow)


if __name__ == "__main__":
    CLI(main)
