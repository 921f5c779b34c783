"""Talk to a model, turn after turn.

python generate/chat.py --checkpoint_dir checkpoints/NAME
python generate/chat.py --checkpoint_dir checkpoints/NAME --adapters poet=out/lora/poet sql=out/lora/sql
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import Asked, Loading, loading_flags, sampling_flags


@sampling_flags(samples=False, max_new_tokens=512, temperature=0.7, top_p=0.9)
@loading_flags(without=["batch_size"])
def main(
    *,
    checkpoint_dir: Path,
    adapters: dict[str, Path] | None = None,
    conversations: Path | None = None,
    system: str = "",
    sampling: Asked,
    overflow: Overflow = "drop_oldest",
    loading: Loading,
) -> None:
    """Read messages from the terminal, or a line each from a pipe, and stream the answers to stdout.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder, which answers unless /model names another one.
        adapters: Further adapters of its base, as NAME=DIR.
        conversations: Folder in which conversations are kept. Left out, it is lit_llama/conversations among the user's
            data, such as ~/.local/share, and those out of a pipe are not kept.
        system: System message that each conversation begins with.
        sampling: How the tokens of answers are drawn.
        overflow: Beyond what the model reads: drop_oldest leaves out the oldest turns, and says so; error refuses.
        loading: How models are loaded.
    """
    from lit_llama.generate.chat.terminal import talk
    from lit_llama.generate.llm import open_folder
    from lit_llama.generate.models import load_models
    from lit_llama.generate.plan import print_plan

    folder = open_folder(checkpoint_dir, loading)
    folder.check_style(system)
    if loading.only_planned:
        print_plan(folder.plan())
        return
    drawn = sampling.over(folder.sampling)
    talk(load_models(checkpoint_dir, adapters, loading), drawn, system=system, folder=conversations, overflow=overflow)


if __name__ == "__main__":
    CLI(main)
