"""Both kinds of tokenizer against the packages themselves, and what no package guards against."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import CORPUS, write_tokenizer
from tokenizers import Tokenizer as Backend

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.tokenizer import HubTokenizer, SentencePieceTokenizer, Streamer, Tokenizer

KINDS = ["tokenizer.json", "trained tokenizer.model", "llama tokenizer.model"]
SCRIPTS = [
    "abc de FG 012 .,;:!?'\"-_()[]{}<|>/\\",
    "éèñçßøæ ÅÖÜ",
    "привет мир",
    "שלום ﷽ سلام",
    "你好世界，北京。",
    "こんにちは カタカナ 한국어",
    "नमस्ते ไทย",
    "😀👍🏽👨‍👩‍👧🇩🇪",
    "\n\r\n\t  \u00a0\u3000\u200b\ufeff\0\x7f",
    "e\u0301 ﬁ Ａ ½ ①",
]


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of several scripts each, the same for the same seed."""
    draw = random.Random(seed)
    letters = [*SCRIPTS, "".join(CORPUS[:4])]
    return [
        "".join("".join(draw.choices(draw.choice(letters), k=draw.randrange(9))) for _ in range(draw.randrange(6)))
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model in LLaMA's manner: BPE, byte pieces, nothing normalised."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session", params=KINDS)
def path(request: pytest.FixtureRequest) -> Path:
    """Each kind in turn."""
    name = {KINDS[0]: "tiny_folder", KINDS[1]: "trained_model", KINDS[2]: "llama_tokenizer"}[request.param]
    found: Path = request.getfixturevalue(name)
    return found / "tokenizer.json" if found.is_dir() else found


@pytest.fixture(scope="session")
def ours(path: Path) -> Tokenizer:
    """What is tested, read as a user names it."""
    return Tokenizer.from_path(path.parent if path.suffix == ".json" else path)


def package_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """The ids of the package itself."""
    if path.suffix == ".json":
        backend = Backend.from_file(str(path))
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids: list[list[int]] = [model.encode(text) for text in texts]
    return ids


def test_ids_equal_those_of_the_package(path: Path, ours: Tokenizer) -> None:
    """Catches a prefix, an end or a normalisation of our own, and an order lost in the batch."""
    texts = mixed_texts(3000)
    wanted = package_ids(path, texts)
    assert ours.encode_batch(texts) == wanted
    assert [ours.encode(text) for text in texts[:50]] == wanted[:50]


def test_ids_of_real_rows_equal_those_of_the_package(path: Path, ours: Tokenizer, alpaca_file: Path) -> None:
    """As above, on long answers as people write them."""
    texts = [row["output"] for row in json.loads(alpaca_file.read_bytes())][:300]
    assert ours.encode_batch(texts) == package_ids(path, texts)


def test_text_comes_back(ours: Tokenizer) -> None:
    """Catches a lost blank, newline or byte: the model would learn another text than the file holds."""
    texts = mixed_texts(2000, seed=1)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ours.decode(ids) == text


def test_what_somebody_typed_never_becomes_a_control_token(ours: Tokenizer) -> None:
    """Catches a user who ends the answer, or speaks as the system, by typing the token."""
    controls = list(ours.control)
    assert controls and ours.eos in controls
    forms = ["{}", "a{}b", " {} ", "\n{}\n", "{}{}", "<{}>", "{}user\nx"]
    texts = [form.replace("{}", token) for form in forms for token in [*controls, "<unk>", "<s>", "</s>"]]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert not set(ids) & set(ours.control.values()), text
        assert ours.decode(ids) == text


def test_control_tokens_are_not_text(ours: Tokenizer) -> None:
    """Catches </s> or <|im_end|> in an answer that is shown."""
    ids = ours.encode("ab")
    assert ours.decode([*ours.control.values(), *ids, ours.eos_id]) == ours.decode(ids) == "ab"
    assert ours.decode([]) == "" and ours.encode("") == []


@pytest.mark.parametrize("beyond", [-1, None, 2**31, 2**70])
def test_an_id_outside_the_vocabulary_is_named(beyond: int | None, ours: Tokenizer) -> None:
    """Catches ids that the packages skip in silence, wrap around, or answer with an IndexError."""
    wrong = ours.size if beyond is None else beyond
    with pytest.raises(DataError, match=rf"id {wrong} is outside the tokenizer's vocabulary of {ours.size}"):
        ours.decode([0, wrong])
    ours.decode([ours.size - 1])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80"])
def test_a_lone_surrogate_is_a_data_error(text: str, ours: Tokenizer) -> None:
    """Catches the TypeError of one package and the RuntimeError of the other."""
    with pytest.raises(DataError, match="lone surrogate"):
        ours.encode_batch(["fine", text])


def test_known_ids_of_llama(llama_tokenizer: Path) -> None:
    """Catches a wrong dummy blank or a wrong end: ids as measured on the original model."""
    ours = Tokenizer.from_path(llama_tokenizer)
    assert isinstance(ours, SentencePieceTokenizer) and ours.files == [llama_tokenizer]
    assert (ours.size, ours.control, ours.bos, ours.eos) == (32000, {"<s>": 1, "</s>": 2}, "<s>", "</s>")
    assert ours.eos_id == 2
    assert ours.encode("Hello") == [15043] and ours.encode("\n") == [29871, 13]
    assert ours.encode("你好") == [29871, 30919, 31076] and ours.encode("</s>") == [1533, 29879, 29958]


@pytest.mark.real
def test_ids_equal_those_of_transformers_for_the_real_folder(real_folder: Path, alpaca_file: Path) -> None:
    """Catches a settings file that transformers minds and we do not."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(real_folder), Tokenizer.from_path(real_folder)
    texts = mixed_texts(1000, seed=2) + [row["output"] for row in json.loads(alpaca_file.read_bytes())][:100]
    assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id and ours.size == len(theirs) and ours.bos == ""
    for ids in theirs(texts[:50])["input_ids"]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_fingerprint_is_of_the_vocabulary(tmp_path: Path, ours: Tokenizer, path: Path) -> None:
    """Catches a tokenizer of equal size with two tokens exchanged, and a hash that changes with the file's name."""
    copy = tmp_path / f"copy{path.suffix}"
    copy.write_bytes(path.read_bytes())
    if path.suffix == ".json":
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert Tokenizer.from_path(copy).fingerprint() == ours.fingerprint()
    if path.suffix == ".json":
        raw = json.loads(copy.read_text())
        vocabulary = raw["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        copy.write_text(json.dumps(raw))
        changed = Tokenizer.from_path(copy)
        assert changed.size == ours.size and changed.fingerprint() != ours.fingerprint()


# What a tokenizer.json and its neighbours say, and how they can be broken.

Change = Callable[[dict[str, Any]], object]
END = {"eos_token": "<|im_end|>"}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the tiny tokenizer.json, changed, and only those settings that are given."""

    def write(change: Change = lambda raw: None, settings: object = None, config: object = None) -> Path:
        write_tokenizer(tmp_path)
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        change(raw)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        for name, value in (("tokenizer_config.json", settings), ("config.json", config)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return tmp_path

    return write


def post_processor(*single: str) -> Change:
    """Let the tokenizer add tokens around the text A on its own."""
    ids = {"<|im_start|>": 1, "<|im_end|>": 2}

    def piece(name: str) -> dict[str, Any]:
        return {"Sequence" if name == "A" else "SpecialToken": {"id": name, "type_id": 0}}

    def change(raw: dict[str, Any]) -> None:
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [piece(name) for name in single],
            "pair": [piece("A"), {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
        }

    return change


@pytest.mark.parametrize(
    ("change", "settings", "bos"),
    [
        (lambda raw: None, END, ""),
        (lambda raw: None, END | {"bos_token": "<|im_start|>"}, ""),
        (lambda raw: None, END | {"bos_token": "<|im_start|>", "add_bos_token": True}, "<|im_start|>"),
        (lambda raw: None, END | {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": None}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": True}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": False}, ""),
        (post_processor("A", "<|im_end|>"), END, ""),
    ],
)
def test_whether_a_text_begins_with_a_token(
    change: Change, settings: object, bos: str, changed: Callable[..., Path]
) -> None:
    """Catches a missing or second beginning, and a tokenizer that adds only an end taken for one that adds a start."""
    ours = Tokenizer.from_path(changed(change, settings))
    assert ours.bos == bos
    assert ours.encode("ab") == ours.encode_batch(["ab"])[0] and 1 not in ours.encode("ab")


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (END, None),
        ({"eos_token": {"content": "<|im_end|>", "special": True}}, None),
        (END, {"eos_token_id": 0}),
        (None, {"eos_token_id": 2}),
        (None, {"eos_token_id": [2, 0]}),
        ({"eos_token": None}, {"eos_token_id": 2}),
        ({"eos_token": "</unknown>"}, {"eos_token_id": 2}),
    ],
)
def test_which_token_ends_a_text(settings: object, config: object, changed: Callable[..., Path]) -> None:
    """Catches an end of another model: the answer would never stop."""
    ours = Tokenizer.from_path(changed(settings=settings, config=config))
    assert (ours.eos, ours.eos_id) == ("<|im_end|>", 2)


def test_a_lone_tokenizer_json_is_used_only_where_its_end_is_clear(changed: Callable[..., Path]) -> None:
    """Catches a guess between two ends (<|endoftext|> and <|im_end|>)."""
    folder = changed()
    with pytest.raises(CheckpointError, match="does not say which token ends a text; pass the model folder"):
        Tokenizer.from_path(folder / "tokenizer.json")
    folder = changed(lambda raw: raw["added_tokens"].pop(0))
    ours = Tokenizer.from_path(folder / "tokenizer.json")
    assert isinstance(ours, HubTokenizer) and (ours.eos, ours.bos) == ("<|im_end|>", "")


def test_truncation_and_padding_in_the_file_have_no_effect(changed: Callable[..., Path]) -> None:
    """Catches texts cut to 4 tokens, or filled up, by a setting that somebody left in the file."""
    plain = Tokenizer.from_path(changed(settings=END)).encode_batch(["a long text of words", "b"])

    def change(raw: dict[str, Any]) -> None:
        backend = Backend.from_str(json.dumps(raw))
        backend.enable_truncation(4)
        backend.enable_padding(length=32)
        raw.update(json.loads(backend.to_str()))

    folder = changed(change, END)
    assert len(Backend.from_file(str(folder / "tokenizer.json")).encode("a long text of words").ids) == 32
    assert Tokenizer.from_path(folder).encode_batch(["a long text of words", "b"]) == plain


def last_token_twice(raw: dict[str, Any]) -> None:
    vocabulary = raw["model"]["vocab"]
    vocabulary[list(vocabulary)[-1]] -= 1


def token_that_moves(raw: dict[str, Any]) -> None:
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 500, "content": "<x>"})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda raw: raw["model"].update(dropout=0.1), END, "dropout makes encoding random"),
        (token_that_moves, END, "added token '<x>' does not keep its id 500"),
        (last_token_twice, END, "without duplicate ids"),
        (lambda raw: raw.clear(), END, "not a usable tokenizer.json"),
        (lambda raw: raw.update(model=None), END, "not a usable tokenizer.json"),
        (lambda raw: raw.update(added_tokens=7), END, "not a usable tokenizer.json"),
        (lambda raw: None, [1, 2], "tokenizer_config.json is not a JSON object"),
        (lambda raw: None, END | {"bos_token": "<s>", "add_bos_token": True}, "no token '<s>'"),
        (lambda raw: None, {"eos_token": ["<|im_end|>"]}, "does not say which token ends"),
    ],
)
def test_a_tokenizer_that_would_go_wrong_in_silence_is_refused(
    change: Change, settings: object, message: str, changed: Callable[..., Path]
) -> None:
    """Catches what the package accepts: random ids, moved ids, two tokens of one id; and tracebacks for the rest."""
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_path(changed(change, settings))


def test_a_regex_that_runs_away_is_an_error(changed: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Catches the package's panic, which is no Exception and passes every handler."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ours = Tokenizer.from_path(changed(lambda raw: raw.update(pre_tokenizer=split), END))
    with pytest.raises(DataError, match="Regex search error"):
        ours.encode("a" * 40 + "b")
    capfd.readouterr()


BROKEN_FILES = {
    "tiktoken": b"IQ== 0\nIg== 1\n" * 50,
    "empty": b"",
    "page": b"<!doctype html><html></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
}


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_another_file_under_a_tokenizers_name(kind: str, name: str, tmp_path: Path) -> None:
    """Catches the packages' unhelpful messages for Llama 3's tiktoken file and for failed downloads."""
    (tmp_path / name).write_bytes(BROKEN_FILES[kind])
    message = "not a sentencepiece model .Llama 3 needs tokenizer.json" if name.endswith("l") else "not a usable"
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_path(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file(share: float, path: Path, tmp_path: Path) -> None:
    """Catches half a vocabulary that is used as if it were whole."""
    raw = path.read_bytes()
    (tmp_path / path.name).write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError):
        Tokenizer.from_path(tmp_path / path.name)


def test_what_is_not_there(tmp_path: Path) -> None:
    """Catches a bare OSError of a package: the message says what was looked for."""
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_path(tmp_path)
    with pytest.raises(CheckpointError, match=r"no\.model does not exist; expected a tokenizer\.model, a"):
        Tokenizer.from_path(tmp_path / "no.model")


# Streaming


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[list[str], str]:
    """What each push gave, and what was left."""
    streamer = Streamer(tokenizer)
    return [streamer.push([token_id]) for token_id in ids], streamer.flush()


def test_streamed_text_equals_the_text_decoded_at_once(ours: Tokenizer) -> None:
    """Catches lost blanks between words, halves of characters, and a last piece that is never given out."""
    texts = mixed_texts(800, seed=3)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        pieces, rest = streamed(ours, ids)
        assert "".join(pieces) + rest == text
        assert "\ufffd" not in "".join(pieces)
        if not text.endswith(" "):
            assert rest == ""


def test_streamed_text_of_any_ids_equals_the_text_decoded_at_once(ours: Tokenizer) -> None:
    """As above for ids of no sense: broken bytes, control tokens in the middle, blanks at the start."""
    draw = random.Random(4)
    odd = [*ours.control.values(), *ours.encode(" \n 😀é")] * 8
    for _ in range(1500):
        ids = draw.choices([*range(min(ours.size, 3000)), *odd], k=draw.randrange(24))
        pieces, rest = streamed(ours, ids)
        assert "".join(pieces) + rest == ours.decode(ids), ids


def test_a_character_of_many_bytes_comes_out_whole(ours: Tokenizer) -> None:
    """Catches U+FFFD on the screen while a character is half there, and a flush that keeps the broken rest."""
    ids = ours.encode("a🦙")
    assert len(ids) > 2
    pieces, rest = streamed(ours, ids)
    assert [piece for piece in pieces if piece] == ["a", "🦙"] and rest == ""
    pieces, rest = streamed(ours, ids[:-1])
    assert "".join(pieces) == "a" and rest == ours.decode(ids[:-1])[1:] and set(rest) == {"\ufffd"}


def test_a_flushed_stream_is_empty(ours: Tokenizer) -> None:
    """Catches the end of an answer shown twice."""
    streamer = Streamer(ours)
    ids = ours.encode("one two")
    assert streamer.push(ids) + streamer.flush() == "one two"
    assert streamer.flush() == "" and streamer.push([]) == ""
