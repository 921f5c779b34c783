"""Cuts of text into words before byte-level BPE merges: the names of `tokenizer.ggml.pre`.

Each name is an entry of a table in llama.cpp; the steps are those of the models' own tokenizer.json.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_llama.convert.tokens import listed
from lit_llama.errors import CheckpointError

_KEY = "tokenizer.ggml.pre"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # a word ends before a capital letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDINGS|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDINGS"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _CASED.replace("ENDINGS", _ENDINGS + "?")
_TEKKEN = _CASED.replace("ENDINGS", "").replace(r"\p{N}{1,3}", r"\p{N}")


class Cut(NamedTuple):
    """Way of cutting that a name stands for.

    Args:
        steps: How text is cut before merging.
        normalizer: What is done to it before that.
        whole: A word that is in the vocabulary is not merged.
        bos: Texts begin with a token of their own where the file does not say (as in llama.cpp).
    """

    steps: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    whole: bool = False
    bos: bool = False


def _split(*patterns: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]


def _words(pattern: str) -> list[dict[str, Any]]:
    return [*_split(pattern), BYTES | {"use_regex": False}]


CUTS: dict[str, Cut] = {
    "gpt-2": Cut([BYTES | {"use_regex": True}]),
    "smollm": Cut([_DIGITS, BYTES | {"use_regex": True}]),
    "llama-bpe": Cut(_words(_LLAMA3), whole=True, bos=True),
    "qwen2": Cut(_words(_QWEN2), _NFC),
    "deepseek-r1-qwen": Cut(_words(_QWEN2)),
    "tekken": Cut(_words(_TEKKEN), whole=True, bos=True),
    "dbrx": Cut(_words(_LLAMA3)),
    "gpt-4o": Cut(_words(_GPT4O)),
    "deepseek-coder": Cut(
        [
            *_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
            _DIGITS,
            BYTES | {"use_regex": False},
        ]
    ),
}
"""By name. Of two that do the same the first is written."""

_ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "deepseek-r1-qwen": ("kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": (
        *("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert"),
        *("mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
    ),
    "gpt-4o": ("llama4", "kanana2"),
}
_NAMES = {name: name for name in CUTS} | {alias: name for name, aliases in _ALIASES.items() for alias in aliases}

# Tokens and ids that no other vocabulary has together; llama.cpp wrote no name before Llama 3 made one necessary.
_KNOWN: dict[str, dict[str, int]] = {
    "llama-bpe": {"!": 0, "Ġthe": 279, "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001},
    "qwen2": {"!": 0, "Ġthe": 279, "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    "gpt-2": {"!": 0, "Ġthe": 262, "<|endoftext|>": 50256},
    "smollm": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3, "!": 17, "Ġthe": 260},
}


def of_metadata(metadata: Mapping[str, Any]) -> Cut:
    """Return the way in which a GGUF file has its text cut.

    Raises:
        CheckpointError: It names one that is not implemented, or none, and its vocabulary is not known.
    """
    name = metadata.get(_KEY)
    if name in _NAMES:
        return CUTS[_NAMES[name]]
    if name not in (None, "default"):
        raise CheckpointError(f"{_KEY} is {name!r}, implemented are {', '.join(_NAMES)}")
    ids = {token: index for index, token in enumerate(listed.tokens(metadata))}
    for known, marks in _KNOWN.items():
        if all(ids.get(token) == index for token, index in marks.items()):
            return CUTS[known]
    found = f"{_KEY} is {name!r}" if name else f"the metadata has no {_KEY}"
    raise CheckpointError(
        f"{found}, and the vocabulary is none of {', '.join(_KNOWN)}, so nothing says how text is cut into words; "
        "write the name of the model's way into the file, as in: gguf-new-metadata --pre-tokenizer llama-bpe OLD NEW"
    )
