"""Talk to a model, turn after turn.

python generate/chat.py --checkpoint_dir checkpoints/NAME
python generate/chat.py --checkpoint_dir checkpoints/NAME --adapters poet=out/lora/poet sql=out/lora/sql
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.generate.flags import Asked, sampling_flags
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
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Literal["stored", "nf4", "nf4-dq", "int8", "fp8"] | None = None,
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
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained.
    """
    from lit_llama.generate.chat.terminal import talk
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.models import load_models

    drawn = sampling.over(open_folder(checkpoint_dir, prompt_style=prompt_style, base_dir=base_dir).sampling)
    models = load_models(
        checkpoint_dir,
        adapters,
        prompt_style=prompt_style,
        base_dir=base_dir,
        precision=precision,
        quantize=quantize,
        system=system,
    )
    talk(models, drawn, system=system, folder=conversations)


if __name__ == "__main__":
    CLI(main)
