"""Continue raw text.

python generate/base.py --checkpoint_dir checkpoints/NAME --prompt "Hello, my name is"
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import Asked, Loading, loading_flags, sampling_flags


@sampling_flags(max_new_tokens=50)
@loading_flags(without=["prompt_style", "batch_size"])
def main(
    *,
    checkpoint_dir: Path,
    prompt: str = "Hello, my name is",
    control_tokens: bool = False,
    sampling: Asked,
    overflow: Overflow = "error",
    loading: Loading,
) -> None:
    """Stream the continuation of a text to stdout, until a token that ends it or the limit.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder.
        prompt: Text to continue.
        control_tokens: Make control tokens of those that the prompt spells, such as <|im_start|>, in place of words.
        sampling: How the tokens are drawn.
        overflow: Beyond what the model reads: error refuses; drop_oldest leaves out the oldest tokens, and says so.
        loading: How the model is loaded.
    """
    from lit_llama.generate.answer import continue_text
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.plan import print_plan

    folder = open_folder(checkpoint_dir, loading)
    if loading.only_planned:
        print_plan(folder.plan())
        return
    drawn = sampling.over(folder.sampling)
    continue_text(folder.load(), prompt, drawn, control_tokens=control_tokens, overflow=overflow)


if __name__ == "__main__":
    CLI(main)
