"""Programs that torch files come from, told by the names of their tensors, and the way out."""

import re
from collections.abc import Iterable
from pathlib import Path

_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"\.adapter_wte\.|\.gating_factor$|\.adapter_(?:bias|scale)$",
        "holds LLaMA-Adapter weights of lit-llama (adapter_wte, gating_factor), which are no LoRA and have no layout "
        "that other programs read: train a LoRA on the same data with finetune/lora.py",
    ),
    (
        r"\.quant_weight$|\.qweight$|\.qzeros$",
        "holds weights quantised with GPTQ, which are not read here: convert the 16-bit file that they were made from, "
        "and hold that in few bits with --quantize",
    ),
    (
        r"\.attn\.(?:qkv|proj)\..*lora_[AB]$|\.mlp\.fc_\d\..*lora_[AB]$|\.lm_head\..*lora_[AB]$",
        "is a LoRA of litgpt: let litgpt put it into its base (litgpt merge_lora), and convert the folder of that",
    ),
    (
        r"^layers\.\d+\.attn\.q_proj\.lora_a\.weight$",
        "is a LoRA of torchtune: let torchtune write PEFT's layout (adapter_model with adapter_config.json beside it)",
    ),
    (
        r"^layers\.\d+\.attn\.[qkv]_proj\.weight$|\.sa_norm\.scale$",
        "holds weights in torchtune's own names: let torchtune write Hugging Face's layout (FullModelHFCheckpointer)",
    ),
    (
        r"^layers\.\d+\.attention\.w[qkvo]\.weight$",
        "is a part of Meta's layout: name the folder, in which the parts are called consolidated.00.pth and so on and "
        "params.json and tokenizer.model lie",
    ),
    (
        r"lora_[AB](?:\.\w+)?\.weight$",
        "is a PEFT adapter: call it adapter_model.bin, put its adapter_config.json beside it, and use that folder",
    ),
    (
        r"^(?:module\.|_orig_mod\.)*model\.layers\.\d+\.self_attn\.",
        "holds weights in Hugging Face's names: call it pytorch_model.bin, put config.json and the tokenizer files "
        "beside it, and name that folder",
    ),
)


def foreign_kind(path: Path, names: Iterable[str]) -> str | None:
    """Describe what a torch file of no layout converted here holds, as a sentence about `path`; None if unknown."""
    known = list(names)
    for pattern, what in _KINDS:
        if any(re.search(pattern, name) for name in known):
            return f"{path} {what}"
    return None
