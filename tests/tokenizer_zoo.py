"""Small tokenizers of every shape that models are published with, and chat templates to render with them."""

import json
from pathlib import Path
from typing import Any

from chat_templates import QWEN3
from conftest import CORPUS

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["<SQL>", "</SQL>", "Zylophen", "<think>", "</think>", "<tool_call>", "</tool_call>"]
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPM_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "byte level": {"pre_tokenizer": {**BYTES, "add_prefix_space": False}},
    "byte level, composed": {"pre_tokenizer": {**BYTES, "add_prefix_space": False}, "normalizer": {"type": "NFC"}},
    "byte level, a blank before each piece": {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
    "a blank before the first piece": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}},
    "a blank before each piece": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}},
    "no blank": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}},
    "legacy": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]},
    },
    "control tokens that take blanks": {"pre_tokenizer": {**BYTES, "add_prefix_space": False}, "strips": True},
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"ChatML": CHATML, "ChatML with <s>": "{{ bos_token }}" + CHATML, "Zephyr": ZEPHYR, "Llama 2": LLAMA2}
THINKING = (  # as DeepSeek-R1's: what was thought goes, and a prompt ends in <think>
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
TOOLS = QWEN3.replace(
    "{%- if messages[0].role == 'system' %}",
    "{%- if tools %}{{- '<|im_start|>system\n# Tools' }}"
    "{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif messages[0].role == 'system' %}",
    1,
).replace(
    "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}",
    "        {%- for call in message.tool_calls or [] %}{{- '<tool_call>\n' + ({'name': call.function.name, "
    "'arguments': call.function.arguments} | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}\n"
    "    {%- endif %}\n{%- endfor %}",
)


def write_shape(folder: Path, name: str, marks: tuple[str, ...] = (), **settings: Any) -> Path:
    """Write a tokenizer of a shape; `marks` are added words of a template."""
    from tokenizers import Tokenizer, models, trainers

    folder.mkdir(parents=True, exist_ok=True)
    shape = dict(SHAPES[name])
    strips = shape.pop("strips", False)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback="Metaspace" in str(shape) or name == "legacy"))
    raw = json.loads(backend.to_str()) | shape
    trainer: dict[str, Any] = {"vocab_size": 420, "special_tokens": CONTROL, "show_progress": False}
    if "ByteLevel" in str(shape):
        from tokenizers import pre_tokenizers

        trainer["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        raw["decoder"] = {**BYTES, "add_prefix_space": False}
    else:
        trainer["special_tokens"] = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer["vocab_size"] = 700
        first = [] if "never" in str(shape) else [STRIP]
        raw["decoder"] = {"type": "Sequence", "decoders": [*SPM_STEPS, *first]}
    backend = Tokenizer.from_str(json.dumps(raw))
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(**trainer))
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in CONTROL]
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    for token in raw["added_tokens"]:
        token["rstrip"] = strips and token["content"].startswith("<|")
        token["lstrip"] = strips and token["content"] == "<|im_end|>"
    for number, word in enumerate([*WORDS, *marks], len(raw["model"]["vocab"])):
        raw["added_tokens"].append({**plain, "id": number, "content": word, "rstrip": False, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    return folder
