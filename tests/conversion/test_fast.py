"""tokenizer.model of either kind -> tokenizer.json, against sentencepiece and tiktoken's algorithm written here."""

import base64
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
import sentencepiece
from conftest import CORPUS
from plain import write_sentencepiece

from lit_llama.conversion.tokens import complete, fast_tokenizer, read_vocabulary, tokenizer_model
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import HubTokenizer, SentencePieceTokenizer

PATTERN = (  # of meta-llama/llama3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    letters = "aabbc ABZ  \n\t\r0123.,<>|'sé北京😀ﬁ\u0301\u2581" + "".join(CORPUS[:4])
    texts = ["".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(count)]
    return [*CORPUS[:4], *texts, *(letter * n for letter in "a =\n\t0北" for n in range(40))]


def train_ranks(size: int) -> list[bytes]:
    """Tokens by rank: the bytes, then whichever pair of neighbours is the most frequent, as tiktoken's are trained."""
    words = [[bytes([byte]) for byte in word.encode()] for text in CORPUS for word in regex.findall(PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = [joined(word, best[0] + best[1]) for word in words]
    return tokens


def joined(word: list[bytes], token: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] + part == token:
            out[-1] = token
        else:
            out.append(part)
    return out


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """A word is a token, or its bytes are joined: always the two neighbours, the first of them, of the lowest rank."""
    ids = []
    for word in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1 and word.encode() not in ranks:
            best, at = min((ranks.get(parts[i] + parts[i + 1], 10**9), i) for i in range(len(parts) - 1))
            if best == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[word.encode()]] if word.encode() in ranks else [ranks[part] for part in parts]
    return ids


@pytest.fixture
def tiktoken_folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer.model as Llama 3 has it, of 400 tokens."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(train_ranks(400))]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return tmp_path


SPECIAL = {
    "3": {"begin_of_text": 0, "end_of_text": 1, "reserved_special_token_3": 5, "eot_id": 9,
          "reserved_special_token_250": 255},
    "3.1": {"finetune_right_pad_id": 4, "start_header_id": 6, "end_header_id": 7, "eom_id": 8, "python_tag": 10,
            "reserved_special_token_247": 255},
}  # fmt: skip


@pytest.mark.parametrize("llama", ["3", "3.1"])
def test_llama_3_tokenizers_encode_as_tiktoken_does(tiktoken_folder: Path, tmp_path: Path, llama: str) -> None:
    """Catches merges in another order, special tokens at other ids, and a file that does not come back."""
    ranks = {token: rank for rank, token in enumerate(train_ranks(400))}
    found = read_vocabulary(tiktoken_folder, 656, 8192, llama=llama)
    made = tmp_path / "made"
    made.mkdir()
    for name, content in found.files.items():
        assert isinstance(content, bytes)
        (made / name).write_bytes(content)
    tokenizer = Tokenizer.from_path(made)
    texts = random_texts(2000)
    assert tokenizer.encode_batch(texts) == [tiktoken_ids(text, ranks) for text in texts]
    assert {name: tokenizer.control[f"<|{name}|>"] - 400 for name in SPECIAL[llama]} == SPECIAL[llama]
    assert len(tokenizer.control) == 256 and found.size == tokenizer.size == 656
    assert (tokenizer.bos, tokenizer.eos, found.bos) == ("<|begin_of_text|>", "<|end_of_text|>", 400)
    assert found.eos == ((401, 409) if llama == "3" else (401, 408, 409))
    assert tokenizer_model(found.files) == (tiktoken_folder / "tokenizer.model").read_bytes()


def test_the_llama_3_folder_opens_in_transformers(tiktoken_folder: Path, tmp_path: Path) -> None:
    """Catches a beginning that other programs do not add."""
    from transformers import AutoTokenizer

    files = read_vocabulary(tiktoken_folder, 656, 8192).files
    made = tmp_path / "made"
    made.mkdir()
    for name, content in files.items():
        (made / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    theirs, ours = AutoTokenizer.from_pretrained(made), Tokenizer.from_path(made)
    for text in CORPUS[:4]:
        assert theirs(text)["input_ids"] == [400, *ours.encode(text)]
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


@pytest.mark.parametrize("which", ["small", "llama_tokenizer"])
def test_a_sentencepiece_model_and_its_tokenizer_json_encode_alike(
    tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    """Catches a folder whose two tokenizer files disagree, and a vocabulary with another fingerprint."""
    path = write_sentencepiece(tmp_path) if which == "small" else request.getfixturevalue(which)
    raw = fast_tokenizer(path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    texts = random_texts(2000)
    fast, slow = HubTokenizer(tmp_path / "tokenizer.json"), SentencePieceTokenizer(path)
    assert fast.encode_batch(texts) == slow.encode_batch(texts)
    assert [fast.decode(ids) for ids in fast.encode_batch(texts)] == [
        slow.decode(ids) for ids in slow.encode_batch(texts)
    ]
    assert fast.fingerprint() == slow.fingerprint()
    assert (fast.bos, fast.eos, fast.eos_id) == ("<s>", "</s>", 2)


def test_a_model_that_normalises_gets_no_tokenizer_json(tmp_path: Path) -> None:
    """Catches a tokenizer.json that encodes otherwise than the model it stands for."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS[:1]), model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, normalization_rule_name="nfkc_cf", minloglevel=2,
        )  # fmt: skip
    assert fast_tokenizer(tmp_path / "tokenizer.model") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:7], b"!!!!", *lines[8:]], "tokenizer.model:8 is not a token in base64 and its rank"),
        (lambda lines: lines[:100] + lines[101:], "expected the ranks 0, 1, 2"),
        (lambda lines: lines[:200], "all 256 bytes"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(tiktoken_folder: Path, change: object, message: str) -> None:
    """Catches a vocabulary with holes."""
    assert callable(change)
    path = tiktoken_folder / "tokenizer.model"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(tiktoken_folder, 656, 8192)


def test_a_folder_with_added_tokens_gets_its_tokenizer_json(beside: Callable[..., Path]) -> None:
    """Catches a merged model that transformers cannot ask: no tokenizer.json, other ids, or no space behind <human>."""
    from transformers import AutoTokenizer

    folder = beside()
    pieces = Tokenizer.from_path(folder).size
    added = {"<human>": pieces, "<bot>": pieces + 1}
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    beside(added_tokens=added, tokenizer_config=settings)
    ours = Tokenizer.from_path(folder)
    complete(folder)
    assert Tokenizer.from_path(folder).fingerprint() == ours.fingerprint()
    theirs = AutoTokenizer.from_pretrained(folder)
    wanted = [1, pieces, *ours.encode(":Zoë's café\n"), pieces + 1, *ours.encode(":")]
    assert theirs("<human>:Zoë's café\n<bot>:")["input_ids"] == wanted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    complete(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_gap_between_the_added_tokens_leaves_the_folder_as_it_is(beside: Callable[..., Path]) -> None:
    """Catches a tokenizer.json in which a token has moved to another id, since the package numbers them itself."""
    folder = beside(added_tokens={"<human>": 1000})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    complete(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
