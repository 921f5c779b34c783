"""Talk to a model, turn after turn.

python generate/chat.py --checkpoint_dir checkpoints/NAME
python generate/chat.py --checkpoint_dir checkpoints/NAME --adapters poet=out/lora/poet sql=out/lora/sql
"""

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import Asked, sampling_flags
from lit_llama.model.config import Held
from lit_llama.text.prompts import StyleName


@sampling_flags(samples=False, max_new_tokens=512, temperature=0.7, top_p=0.9)
def main(
    *,
    checkpoint_dir: Path,
    adapters: dict[str, Path] | None = None,
    base_dir: Path | None = None,
    conversations: Path | None = None,
    system: str = "",
    sampling: Asked,
    overflow: Overflow = "drop_oldest",
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
    draft_dir: Path | None = None,
    plan: bool = False,
    plan_memory: str | None = None,
) -> None:
    """Read messages from the terminal, or a line each from a pipe, and stream the answers to stdout.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder, which answers unless /model names another one.
        adapters: Further adapters of its base, as NAME=DIR.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        conversations: Folder in which conversations are kept. Left out, it is lit_llama/conversations among the user's
            data, such as ~/.local/share, and those out of a pipe are not kept.
        system: System message that each conversation begins with.
        sampling: How the tokens of answers are drawn.
        overflow: Beyond what the model reads: drop_oldest leaves out the oldest turns, and says so; error refuses.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
    """
    from lit_llama.generate.chat.terminal import talk
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.models import load_models
    from lit_llama.generate.plan import print_plan

    folder = open_folder(checkpoint_dir, prompt_style=prompt_style, base_dir=base_dir)
    folder.check_style(system)
    if plan or plan_memory is not None:
        print_plan(folder.plan(precision=precision, quantize=quantize, memory=plan_memory))
        return
    drawn = sampling.over(folder.sampling)
    models = load_models(
        checkpoint_dir,
        adapters,
        prompt_style=prompt_style,
        base_dir=base_dir,
        precision=precision,
        quantize=quantize,
        draft_dir=draft_dir,
    )
    talk(models, drawn, system=system, folder=conversations, overflow=overflow)


if __name__ == "__main__":
    CLI(main)
