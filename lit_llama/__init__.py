"""Prepare instruction data, fine-tune LLaMA-family models with LoRA, and generate with the result.

What a notebook needs, imported only when it is named:

    import lit_llama
    llm = lit_llama.load(Path("out/lora/demo"))             # model, tokenizer and prompt style of a folder
    model = lit_llama.load_model(Path("checkpoints/NAME"))      # token ids (T,) -> logits (T, V)
    tokenizer = lit_llama.Tokenizer.from_path(Path("checkpoints/NAME"))
"""

TYPE_CHECKING = False  # a type checker takes it for True; typing itself takes a while, in which Ctrl-C is loud
if TYPE_CHECKING:
    from typing import Any

    from lit_llama.generate.engine.request import Sampling
    from lit_llama.generate.llm import LLM, load
    from lit_llama.model.checkpoint import load_model
    from lit_llama.model.config import LLaMAConfig, LoRAConfig
    from lit_llama.model.llama import LLaMA
    from lit_llama.model.lora import apply_lora
    from lit_llama.text.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "LLaMA",
    "LLaMAConfig",
    "LoRAConfig",
    "Sampling",
    "Tokenizer",
    "apply_lora",
    "load",
    "load_model",
]

_HOMES = {
    "LLaMA": "model.llama",
    "LLaMAConfig": "model.config",
    "LoRAConfig": "model.config",
    "Sampling": "generate.engine.request",
    "LLM": "generate.llm",
    "Tokenizer": "text.tokenizer",
    "apply_lora": "model.lora",
    "load": "generate.llm",
    "load_model": "model.checkpoint",
}


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"lit_llama.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lit_llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What can be named, imported or not, so that a notebook completes it."""
    return sorted({*globals(), *__all__})
