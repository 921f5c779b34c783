"""Byte-level BPE in the two spellings: metadata of a GGUF file, and tokenizer.json.

The cuts of text into words before merges have the names of `tokenizer.ggml.pre`. Each name is an entry of a table in
llama.cpp; the steps are those of the models' own tokenizer.json.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_llama.conversion import listed
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import Kind

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
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}")
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
    "qwen35": Cut(_words(_QWEN35), _NFC),
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


def cut_of(metadata: Mapping[str, Any]) -> Cut:
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


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the tokenizer of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: It cuts text in a way that is not implemented, or contradicts itself.
    """
    cut = cut_of(metadata)
    tokens = listed.tokens(metadata)
    types = listed.kinds(metadata, len(tokens))
    entries = list(enumerate(zip(tokens, types, strict=True)))
    vocabulary = {
        token: index for index, (token, kind) in entries if kind != Kind.UNUSED or token != listed.padding(index)
    }
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == Kind.CONTROL,
        }
        for index, (token, kind) in entries
        if kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": cut.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.steps},
        "post_processor": _post_processor(metadata, tokens),
        "decoder": BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.whole,
            "vocab": vocabulary,
            "merges": listed.merges(metadata, vocabulary),
        },
    }


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with a token of their own."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", cut_of(metadata).bos))


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Puts the beginning-of-text token first where the model wants one."""
    if not adds_bos(metadata):
        return None
    bos_id = listed.token_id(metadata, "bos", len(tokens))
    bos = {"SpecialToken": {"id": tokens[bos_id], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos_id]: {"id": tokens[bos_id], "ids": [bos_id], "tokens": [tokens[bos_id]]}},
    }


def is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json works on bytes, as GPT-2 does."""
    return any(step.get("type") == "ByteLevel" for step in _steps(raw.get("pre_tokenizer"), "pretokenizers"))


def to_metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that `tokenizer_json` reads, without the tokens: `pre` and `merges` of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: GGUF has no name for the way in which the tokenizer.json cuts text.
    """
    model = raw["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or odd or model.get("byte_fallback"):
        raise CheckpointError(f"tokenizer.json: a {model.get('type')} model {' '.join(odd)} has no form in GGUF")
    steps = _comparable(_steps(raw.get("pre_tokenizer"), "pretokenizers"))
    normalizers = _steps(raw.get("normalizer"), "normalizers")
    for name, cut in CUTS.items():
        same = steps == _comparable(cut.steps) and normalizers == ([cut.normalizer] if cut.normalizer else [])
        if same and cut.whole == bool(model.get("ignore_merges")):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    raise CheckpointError(
        f"tokenizer.json cuts text in a way that GGUF has no name for here; known are {', '.join(CUTS)}. "
        f"It has normalizer {raw.get('normalizer')} and pre_tokenizer {raw.get('pre_tokenizer')}"
    )


def _steps(part: Mapping[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """One step, or a sequence of them, as a list."""
    if not part:
        return []
    return [dict(step) for step in part[members]] if part.get("type") == "Sequence" else [dict(part)]


def _comparable(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps without what changes no id."""
    steps = [
        step | {"use_regex": step.get("use_regex", True)} if step["type"] == "ByteLevel" else step for step in steps
    ]
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
