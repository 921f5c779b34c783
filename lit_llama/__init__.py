"""Prepare instruction data, fine-tune LLaMA-family models with LoRA, and generate with the result.

What a notebook needs, imported only when it is named:

    import lit_llama
    data = lit_llama.prepare("rows.jsonl", "data/mine", "checkpoints/NAME")    # raw rows -> a data folder
    run = lit_llama.finetune("checkpoints/NAME", data, "out/lora/mine")        # -> an adapter folder, with its losses
    with lit_llama.load(run) as llm:                                           # model, tokenizer and prompt style
        print(llm.generate("What food do llamas eat?"))

`merge`, `convert`, `add_delta`, `download`, `evaluate`, `generate_rows` and `show_rows` are there as well;
docs/python.md shows all of them. They are silent: `lit_llama.verbose()` has them say what they do.

Underneath, token ids and logits:

    model = lit_llama.load_model(Path("checkpoints/NAME"))      # token ids (T,) -> logits (T, V)
    tokenizer = lit_llama.Tokenizer.from_path(Path("checkpoints/NAME"))
"""

TYPE_CHECKING = False  # a type checker takes it for True; typing itself takes a while, in which Ctrl-C is loud
if TYPE_CHECKING:
    from typing import Any

    from lit_llama.api.stages import evaluate, find_learning_rate, finetune, generate_rows, load, prepare
    from lit_llama.api.weights import add_delta, convert, download, merge
    from lit_llama.console import verbose
    from lit_llama.conversion.delta_config import DeltaConfig
    from lit_llama.errors import UserError
    from lit_llama.generate.engine.request import Sampling
    from lit_llama.generate.llm import LLM
    from lit_llama.model.adapters.lora import apply_lora
    from lit_llama.model.config import LLaMAConfig, LoRAConfig
    from lit_llama.model.files.checkpoint import load_model
    from lit_llama.model.llama import LLaMA
    from lit_llama.text.config import PrepareConfig
    from lit_llama.text.inspect.show import show_rows
    from lit_llama.text.tokenizer.base import Tokenizer
    from lit_llama.train.config import RunConfig, TrainConfig

__all__ = [
    "LLM",
    "DeltaConfig",
    "LLaMA",
    "LLaMAConfig",
    "LoRAConfig",
    "PrepareConfig",
    "RunConfig",
    "Sampling",
    "Tokenizer",
    "TrainConfig",
    "UserError",
    "add_delta",
    "apply_lora",
    "convert",
    "download",
    "evaluate",
    "find_learning_rate",
    "finetune",
    "generate_rows",
    "load",
    "load_model",
    "merge",
    "prepare",
    "show_rows",
    "verbose",
]

_HOMES = {
    "DeltaConfig": "conversion.delta_config",
    "LLaMA": "model.llama",
    "LLaMAConfig": "model.config",
    "LoRAConfig": "model.config",
    "PrepareConfig": "text.config",
    "RunConfig": "train.config",
    "Sampling": "generate.engine.request",
    "LLM": "generate.llm",
    "Tokenizer": "text.tokenizer.base",
    "TrainConfig": "train.config",
    "UserError": "errors",
    "add_delta": "api.weights",
    "apply_lora": "model.adapters.lora",
    "convert": "api.weights",
    "download": "api.weights",
    "evaluate": "api.stages",
    "find_learning_rate": "api.stages",
    "finetune": "api.stages",
    "generate_rows": "api.stages",
    "load": "api.stages",
    "load_model": "model.files.checkpoint",
    "merge": "api.weights",
    "prepare": "api.stages",
    "show_rows": "text.inspect.show",
    "verbose": "console",
}


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in _HOMES:
        globals()[name] = found = getattr(import_module(f"lit_llama.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module 'lit_llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What can be named, imported or not, so that a notebook completes it."""
    return sorted({*globals(), *__all__})
