"""Tokenizers rebuilt from GGUF metadata against ones built with the tokenizers package directly."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from lit_llama.conversion.bpe import adds_bos, tokenizer_json
from lit_llama.errors import CheckpointError

TEXTS = [
    "",
    " ",
    "\n",
    "Below is an instruction that describes a task.",
    "  two spaces\t\ttabs\n\n\nlines  \n",
    "Zoë's naïve café, 北京 is a city. 😀👩‍👩‍👧 e\u0301",
    "3.14159 and 1234567 in 2024, 12x34",
    "I'll, WE'VE, they'd: don't!!! ...and so on…",
    '{"item": "blue lamp", "quantity": 2}',
    "def add(a, b):\r\n    return a+b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "\u00a0\u2003\ufeff\u200b\x00\x7f",
]
SMOLLM = ["endoftext", "im_start", "im_end"]
# Llama 3's published pattern.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE, TOKENS = "tokenizer.ggml.pre", "tokenizer.ggml.tokens"
# Of the published vocabularies: Llama 3, Qwen 2, GPT-2 and SmolLM 2.
KNOWN: dict[str, dict[str, int]] = {
    "llama-bpe": {"!": 0, "Ġthe": 279, "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001},
    "qwen2": {"!": 0, "Ġthe": 279, "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    "gpt-2": {"!": 0, "Ġthe": 262, "<|endoftext|>": 50256},
    "smollm": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3, "!": 17, "Ġthe": 260},
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE of 384 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    contents: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return contents


@pytest.fixture
def metadata(raw: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer as GGUF holds it."""
    vocabulary = raw["model"]["vocab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(vocabulary) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))


def reference(raw: dict[str, Any], pre: list[Any], special: list[str], **settings: Any) -> Tokenizer:
    """Built part by part with the package."""
    merges = [tuple(merge) for merge in raw["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=raw["model"]["vocab"], merges=merges, **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in special])
    return tokenizer


def test_smollm_cuts_text_as_the_reference_does(raw: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Catches digits that are not split one by one, a space put in front, merges in the wrong order."""
    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ours, theirs = rebuilt(metadata), reference(raw, pre, SMOLLM)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text == theirs.decode(ids, skip_special_tokens=False)


def test_gpt2_cuts_text_as_the_reference_does(raw: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Catches numbers split where GPT-2 keeps them."""
    ours = rebuilt(metadata | {"tokenizer.ggml.pre": "gpt-2"})
    theirs = reference(raw, [pre_tokenizers.ByteLevel(add_prefix_space=False)], SMOLLM)
    assert [ours.encode(text).ids for text in TEXTS] == [theirs.encode(text).ids for text in TEXTS]


def test_llama3_cuts_text_as_the_reference_does(raw: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Catches another pattern, and words found whole in the vocabulary that are merged all the same."""
    ours = rebuilt(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    pre = [
        pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    theirs = reference(raw, pre, SMOLLM, ignore_merges=True)
    assert [ours.encode(text).ids for text in TEXTS] == [theirs.encode(text).ids for text in TEXTS]


def test_special_tokens_keep_their_ids(metadata: dict[str, Any]) -> None:
    """Catches added tokens that are numbered anew from the end, and user-defined ones that vanish in decoding."""
    metadata["tokenizer.ggml.token_type"][300] = 4
    user = metadata["tokenizer.ggml.tokens"][300]
    tokenizer = rebuilt(metadata)
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        assert tokenizer.token_to_id(token) == index
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(metadata["tokenizer.ggml.tokens"])
    added = {index: token.special for index, token in tokenizer.get_added_tokens_decoder().items()}
    assert added == {0: True, 1: True, 2: True, 300: False}
    assert tokenizer.encode(f"a<|im_end|>{user}<|im_end|>").ids[-3:] == [2, 300, 2]


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({}, False),
        ({"tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),  # llama.cpp's rule where the file does not say
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_a_beginning_of_text_is_put_first_where_the_model_wants_one(
    metadata: dict[str, Any], changes: dict[str, Any], adds: bool
) -> None:
    """Catches a model of Llama 3 that never sees the token its texts began with, and one that nobody wants."""
    metadata |= changes
    tokenizer = rebuilt(metadata)
    plain = tokenizer.encode("a city", add_special_tokens=False).ids
    assert 1 not in plain
    assert tokenizer.encode("a city").ids == [1] * adds + plain
    assert tokenizer.encode("a city", "a city").ids == ([1] * adds + plain + plain)
    assert adds_bos(metadata) is adds


MERGES, TYPES = "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a way that is not implemented": ({PRE: "viking"}, "pre is 'viking', implemented are gpt-2, smollm, llama-bpe"),
    "a way that nobody knows": ({PRE: "default"}, "pre is 'default', and the vocabulary is none of llama-bpe"),
    "no way": ({PRE: None}, r"the metadata has no tokenizer\.ggml\.pre, .* gguf-new-metadata --pre-tokenizer"),
    "twice": ({TOKENS: ["a", "b", "a"]}, "the same token twice: 0 and 2 are 'a'"),
    "no types": ({TYPES: None}, r"the metadata has no tokenizer\.ggml\.token_type"),
    "too few types": ({TYPES: [1]}, r"token_type has 1 entries, but tokenizer\.ggml\.tokens has 384"),
    "no merges": ({MERGES: None}, r"the metadata has no tokenizer\.ggml\.merges"),
    "a merge of three": ({MERGES: ["a b c"]}, r"merges: entry 0 is 'a b c', expected two tokens"),
    "a merge into nothing": ({MERGES: ["Q Z"]}, r"merges: entry 0 is 'Q Z', but 'QZ' is not in"),
    "no beginning": (
        {PRE: "llama-bpe", "tokenizer.ggml.bos_token_id": None},
        r"the metadata has no tokenizer\.ggml\.bos_token_id",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_rebuilt_is_named(metadata: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Catches a tokenizer that cuts text in another way than the model was trained with, and a bare KeyError."""
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json(metadata | changes)


@pytest.mark.parametrize(("known", "marks"), KNOWN.items(), ids=KNOWN)
def test_a_file_without_a_way_is_known_by_its_vocabulary(
    metadata: dict[str, Any], known: str, marks: dict[str, int]
) -> None:
    """Catches a Llama 3 of early files that is cut as GPT-2 is; one token at another place, and it is not known."""
    tokens = [f"[{index}]" for index in range(max(marks.values()) + 1)]
    for token, index in marks.items():
        tokens[index] = token
    early = {**metadata, PRE: None, TOKENS: tokens, TYPES: [1] * len(tokens), MERGES: []}
    found, wanted = tokenizer_json(early), tokenizer_json({**early, PRE: known})
    assert found == wanted and found["pre_tokenizer"] != tokenizer_json({**early, PRE: "tekken"})["pre_tokenizer"]
    tokens[0], tokens[marks["Ġthe"]] = tokens[marks["Ġthe"]], tokens[0]
    with pytest.raises(CheckpointError, match="the vocabulary is none of"):
        tokenizer_json(early)


@pytest.mark.real
def test_the_real_tokenizer_is_that_of_smollm(real_folder: Path) -> None:
    """49152 tokens and 48900 merges; ids of known words from the published tokenizer's structure."""
    contents = json.loads((real_folder / "tokenizer.json").read_text("utf-8"))
    assert len(contents["model"]["vocab"]) == 49152 and len(contents["model"]["merges"]) == 48900
    names = [token["content"].strip("<|>") for token in contents["added_tokens"]]
    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs = reference(contents, pre, SMOLLM)
    theirs.add_special_tokens([token["content"] for token in contents["added_tokens"]])
    assert len(names) == 17 and [token["id"] for token in contents["added_tokens"]] == list(range(17))
    ours = Tokenizer.from_file(str(real_folder / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
