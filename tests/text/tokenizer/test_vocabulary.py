"""Tokenizers that do not belong to the weights they lie beside, and special ids of no sense."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model, write_adapter, write_tokenizer
from paged_steps import made_by

from lit_llama.conversion.merge import merge
from lit_llama.conversion.source import Source, write_folder
from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.folder.manifest import MANIFEST
from lit_llama.generate.llm import load
from lit_llama.model.config import LoRAConfig
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.alpaca import prepare_alpaca
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import check_recorded, check_vocabulary, identity, special_ids
from lit_llama.train.config import RunConfig, TrainConfig
from lit_llama.train.methods.method import LoRA
from lit_llama.train.run import finetune

Beside = Callable[..., Path]
Rows = Callable[[list[dict[str, str]]], Path]


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(value | changes))


def prepare(tokenizer_path: Path, data: Path) -> dict[str, Any]:
    config = PrepareConfig(
        destination_path=data,
        tokenizer_path=tokenizer_path,
        prompt_style="chatml",
        max_seq_length=200,
        split="shuffle",
        test_split_size=2,
        seed=1,
    )
    return prepare_alpaca(config, "rows.json")


def train(checkpoint: Path, data: Path, out: Path) -> None:
    settings: dict[str, Any] = {"precision": "32-true", "train": TrainConfig(max_steps=1, batch_size=2)}
    config = RunConfig(checkpoint_dir=checkpoint, data_dir=data, out_dir=out, lora=LoRAConfig(r=2), **settings)
    finetune(LoRA(config.lora), config)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder as prepare/checkpoint.py writes it, with meta.json."""
    model, files = tiny_model(), tmp_path / "files"
    files.mkdir()
    write_tokenizer(files)
    source = Source(
        path=tmp_path / "model.gguf",
        kind="GGUF",
        config=tiny_config(eos_token_id=(2,)).to_dict("float32"),
        specs={name: ("F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()},
        read=model.state_dict().__getitem__,
        files={path.name: path for path in files.iterdir()},
    )
    write_folder(source, tmp_path / "converted")
    return tmp_path / "converted"


def exchange_tokens(folder: Path) -> None:
    """Another vocabulary of the same size."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("padding", [0, 1, 40])
def test_fewer_tokens_than_rows_are_fine(padding: int, tiny_folder: Path) -> None:
    """Catches Ziya (39410 tokens, 39424 rows) refused."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    check_vocabulary(tiny_folder, tokenizer.size + padding, tokenizer)


def test_more_tokens_than_rows_are_spelled_with_the_way_out(beside: Beside, trained_model: Path) -> None:
    """Catches an id that reads past the embedding, and an error that leaves the user alone with two numbers."""
    size = Tokenizer.from_path(trained_model).size
    folder = beside(added_tokens={f"<{i}>": size + i for i in (0, 1, 2, 4)})
    tokenizer = Tokenizer.from_path(folder)
    with pytest.raises(CheckpointError) as caught:
        check_vocabulary(folder, size, tokenizer)
    message = str(caught.value)
    assert f"has {size + 5} tokens, the embedding only {size} rows" in message
    assert f": <0> ({size}), <1> ({size + 1}), <2> ({size + 2}), ... have none" in message
    assert f"prepare/checkpoint.py --source {folder} --destination_path {folder}-resized" in message
    assert message.endswith(f" --resize_vocab {size + 5}")
    with pytest.raises(CheckpointError, match=rf"only {size + 4} rows: <4> \({size + 4}\) have none"):
        check_vocabulary(folder, size + 4, tokenizer)


def test_every_stage_refuses_a_tokenizer_that_is_too_large(converted: Path, alpaca_rows: Rows, tmp_path: Path) -> None:
    """Catches a stage that goes on: preparing for hours, or merging, what can never be loaded."""
    adapter = write_adapter(tmp_path / "adapter", converted)
    data = alpaca_rows([{"instruction": f"Say {i}.", "output": str(i)} for i in range(9)])
    prepare(converted, data)
    token = {"id": 384, "content": "<extra>", "special": True, "single_word": False, "lstrip": False}
    raw = json.loads((converted / "tokenizer.json").read_text())
    raw["added_tokens"].append(token | {"rstrip": False, "normalized": False})
    (converted / "tokenizer.json").write_text(json.dumps(raw))
    (converted / MANIFEST).unlink()
    stages: list[Callable[[], object]] = [
        lambda: load(converted),
        lambda: load(adapter),
        lambda: prepare(converted, data),
        lambda: train(converted, data, tmp_path / "out"),
        lambda: merge(adapter, tmp_path / "merged", dtype=None, precision="32-true"),
    ]
    for stage in stages:
        with pytest.raises(CheckpointError, match=r"385 tokens.*only 384 rows: <extra> \(384\).*--resize_vocab 385"):
            stage()
    assert prepare(converted / "tokenizer.json", data)["tokenizer"]["size"] == 385  # no weights to compare with


def test_ids_of_padding_rows_are_never_drawn() -> None:
    """Catches an id that the tokenizer cannot decode, drawn because its untrained row happens to win."""
    from lit_llama.generate.engine.request import Sampling

    model = tiny_model()
    model.lm_head.weight[300:] *= 10
    drawn = {
        tokens: [
            token
            for seed in range(8)
            for sampling in (Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=1.5, seed=seed))
            for token in made_by(model, [[5 + seed]], sampling, tokens=tokens)[0]
        ]
        for tokens in (None, 300)
    }
    assert max(drawn[300]) < 300 <= max(drawn[None])


def test_a_converted_folder_records_its_tokenizer(converted: Path) -> None:
    """Catches a folder whose tokenizer files can be exchanged unnoticed."""
    tokenizer = Tokenizer.from_path(converted)
    meta = json.loads((converted / "meta.json").read_text())
    assert meta["tokenizer"] == identity(tokenizer) == {"fingerprint": tokenizer.fingerprint(), "size": 384}
    load(converted)
    (converted / MANIFEST).unlink()
    exchange_tokens(converted)
    with pytest.raises(IntegrityError, match=r"meta\.json records the tokenizer of this folder with 384.*converted"):
        load(converted)


def test_a_tokenizer_that_cannot_be_read_is_taken_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches weights that cannot be converted because of a tokenizer of another kind."""
    model = tiny_model()
    source = Source(
        path=tmp_path / "model.gguf",
        kind="GGUF",
        config=model.config.to_dict("float32"),
        specs={name: ("F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()},
        read=model.state_dict().__getitem__,
        files={"tokenizer.model": b"IQ== 0\n"},
    )
    write_folder(source, tmp_path / "out")
    assert "tokenizer" not in json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"IQ== 0\n"
    assert "not recorded" in capsys.readouterr().err


def test_an_adapter_keeps_to_the_tokenizer_of_its_data(converted: Path, tmp_path: Path) -> None:
    """Catches an adapter asked through another vocabulary of the same size: fluent nonsense, and no error."""
    adapter = write_adapter(tmp_path / "adapter", converted)
    data = {"tokenizer": identity(Tokenizer.from_path(converted)) | {"path": "checkpoints/first"}}
    edit(adapter / "meta.json", data=data)
    load(adapter)
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    assert json.loads((tmp_path / "merged" / "meta.json").read_text())["tokenizer"]["size"] == 384
    (converted / MANIFEST).unlink()
    (converted / "meta.json").unlink()  # records the tokenizer, too
    exchange_tokens(converted)
    message = r"adapter/meta\.json records the tokenizer checkpoints/first with 384.*converted.*another vocabulary"
    with pytest.raises(IntegrityError, match=message):
        load(adapter)
    with pytest.raises(IntegrityError, match=message):
        merge(adapter, tmp_path / "again", dtype=None, precision="32-true")


@pytest.mark.parametrize(
    "meta", [None, {}, {"tokenizer": None}, {"tokenizer": {"size": 3}}, {"data": {"rows": 7}}, {"data": 3}]
)
def test_a_folder_that_records_nothing_is_taken_as_it_is(meta: object, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches folders of other programs refused."""
    if meta is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    check_recorded(tmp_path, Tokenizer.from_path(tiny_folder), tiny_folder)


HEALTHY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "SmolLM2": ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, {"bos_token_id": 1, "eos_token_id": 2}),
    "Ziya": ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, {}),
    "a list, as in Llama 3": ({"bos_token_id": 1, "eos_token_id": [2, 400, 401]}, {"eos_token_id": [400, 401]}),
    "a list, as in Qwen": ({"eos_token_id": 2}, {"eos_token_id": [2, 400], "pad_token_id": 400}),
    "a pad among the padding": ({"vocab_size": 1000, "pad_token_id": 999}, {}),
    "no end": ({"eos_token_id": None}, {"eos_token_id": []}),
}


@pytest.fixture
def llama(beside: Beside, trained_model: Path) -> Path:
    """A sentencepiece folder with two more control tokens, 400 and 401 in the words of the tests."""
    size = Tokenizer.from_path(trained_model).size
    return beside(added_tokens={"<|eot|>": size, "<|eom|>": size + 1})


def write_ids(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> int:
    size = Tokenizer.from_path(folder).size - 2

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(i) for i in value]
        return value - 400 + size if value in (400, 401) else value

    for name, values in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps({key: real(value) for key, value in values.items()}))
    return size


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_ids_are_taken_without_a_word(name: str, llama: Path) -> None:
    """Catches a warning that everybody sees and nobody reads, and an end that is lost."""
    config, generation = HEALTHY[name]
    size = write_ids(llama, config, generation)
    found = special_ids(llama, Tokenizer.from_path(llama))
    assert not found.remarks
    ends = {i for raw in (config, generation) for i in _listed(raw.get("eos_token_id"))}
    assert found.ends == {2} | {i - 400 + size if i >= 400 else i for i in ends}


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


@pytest.mark.parametrize(
    ("config", "generation", "told", "ends"),
    [
        (
            {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": -1},
            {},
            ["config.json: ignoring bos_token_id 0 (the unknown token <unk>), eos_token_id 0 (", "pad_token_id -1"],
            {2},
        ),
        ({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}, {}, ["eos_token_id 1 (the beginning <s>)"], {2}),
        ({"eos_token_id": [2, 300]}, {}, ["eos_token_id 300 (the word '"], {2}),
        ({}, {"eos_token_id": [300, 99999]}, ["generation_config.json: ignoring eos_token_id 300", "99999 (not"], {2}),
        ({"eos_token_id": "</s>"}, {"eos_token_id": True}, ["</s> (not among", "True (not among"], {2}),
        ({"pad_token_id": -1}, {"pad_token_id": 5000}, ["pad_token_id -1 (not", "pad_token_id 5000 (not"], {2}),
        ({"eos_token_id": 0}, {"eos_token_id": 400}, ["bos 1 (<s>) and eos 2 (</s>)"], {2, 400}),
    ],
)
def test_ids_of_no_sense_are_left_out_aloud(
    config: dict[str, Any], generation: dict[str, Any], told: list[str], ends: set[int], llama: Path
) -> None:
    """Catches answers that end at an ordinary word or at the unknown token, or never (early LLaMA conversions)."""
    size = write_ids(llama, config, generation)
    found = special_ids(llama, Tokenizer.from_path(llama))
    text = "\n".join(found.remarks)
    assert all(part in text for part in told), text
    assert found.ends == {size if i == 400 else i for i in ends}
    for remark in found.remarks:
        assert remark.startswith(str(llama)) and remark.endswith("the tokenizer has bos 1 (<s>) and eos 2 (</s>)")


@pytest.mark.real
def test_the_real_folder_is_healthy(real_folder: Path) -> None:
    """Catches a rule that a real model does not keep to."""
    tokenizer = Tokenizer.from_path(real_folder)
    assert not tokenizer.remarks and not special_ids(real_folder, tokenizer).remarks


def test_training_says_what_is_ignored_and_keeps_the_record(
    converted: Path, alpaca_rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a folder of no sense found out after the training, and an adapter that does not record its tokenizer."""
    data = alpaca_rows([{"instruction": f"Say {i}.", "output": str(i)} for i in range(9)])
    prepare(converted, data)
    edit(converted / "generation_config.json", eos_token_id=[2, 300])
    train(converted, data, tmp_path / "out")
    assert "generation_config.json: ignoring eos_token_id 300 (the word '" in capsys.readouterr().err
    (converted / MANIFEST).unlink(missing_ok=True)
    exchange_tokens(converted)
    with pytest.raises(IntegrityError, match="another vocabulary"):
        train(converted, data, tmp_path / "again")
    with pytest.raises(IntegrityError, match=r"out/meta\.json records the tokenizer .*converted with 384"):
        load(tmp_path / "out")


def test_loading_says_what_is_ignored_in_one_line(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a warning that is made but never printed, or loses its brackets to the console."""
    edit(converted / "generation_config.json", eos_token_id=[2, 300], pad_token_id=-1)
    assert load(converted).stop_ids == {2}
    lines = [line for line in capsys.readouterr().err.splitlines() if "ignoring" in line]
    assert len(lines) == 1 and "eos_token_id 300 (the word '" in lines[0] and "pad_token_id -1" in lines[0]
