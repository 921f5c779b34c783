"""Folders in Meta's layout that lack something or hold something else: each is refused, and nothing is left."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_files import nothing_left, write, write_checklist
from meta_files import vocabulary as vocabulary  # a fixture
from plain import Sizes, State, random_state, write_sentencepiece

from lit_llama.conversion import convert
from lit_llama.conversion.layouts.meta import open_meta
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError


def refused(folder: Path, destination: Path, message: str, kind: type[UserError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        convert(folder, destination)
    assert message in str(caught.value), caught.value
    assert nothing_left(destination)


@pytest.mark.parametrize(("gone", "missing"), [(0, "consolidated.00.pth"), (1, "consolidated.01.pth")])
def test_a_gap_in_the_shards_is_named(tmp_path: Path, vocabulary: Path, gone: int, missing: str) -> None:
    """Row 1 of the catalogue; catches a model joined from what happens to be there."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 4)
    (folder / f"consolidated.{gone:02d}.pth").unlink()
    refused(folder, tmp_path / "made", f"missing is {missing}")


def test_a_missing_last_shard_is_seen(tmp_path: Path, vocabulary: Path) -> None:
    """Catches a plausible model of half the width; checklist.chk names the file, without it the width gives it away."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 2)
    write_checklist(folder)
    (folder / "consolidated.01.pth").unlink()
    refused(folder, tmp_path / "made", "lists consolidated.01.pth, which is missing (found: ", IntegrityError)
    (folder / "checklist.chk").unlink()
    refused(folder, tmp_path / "made", "dim is 64, but wq has 32 rows in 1 shard: shards are missing")


def test_the_checklist_is_compared(tmp_path: Path, vocabulary: Path) -> None:
    """Row 2; catches a flipped bit, and a checklist of a failed download that proves nothing."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 2)
    write_checklist(folder)
    assert open_meta(folder).notes["md5"] == "4 files are what checklist.chk says"
    path = folder / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    good = hashlib.md5(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bad = hashlib.md5(content).hexdigest()
    refused(folder, tmp_path / "made", f"consolidated.01.pth: md5 expected {good}, got {bad}", IntegrityError)
    (folder / "checklist.chk").write_text("")
    refused(folder, tmp_path / "made", "checklist.chk is empty", IntegrityError)
    (folder / "checklist.chk").write_text("<html>\n")
    refused(folder, tmp_path / "made", "'<html>' is not an md5 and a file name", IntegrityError)
    (folder / "checklist.chk").unlink()
    refused(folder, tmp_path / "made", "checksum")  # torch's own, which every file has


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": 128}, "dim is 128, but wq has 64 columns: it belongs to a model of another size"),
        ({"n_layers": 3}, "9 missing (layers.2."),
        ({"n_layers": 1}, "9 unknown (layers.1."),
        ({"n_heads": "absent"}, "n_heads is None"),
        ({"n_heads": 3}, "heads that divide dim"),
        ({"n_kv_heads": 3}, "num_key_value_heads 3"),
        ({"norm_eps": "absent"}, "norm_eps None"),
        ({"vocab_size": 32000}, "vocab_size is 32000, but the embedding has 384 rows"),
        (
            {"quantization_args": {"scheme": "int4"}},
            "quantization_args is {'scheme': 'int4'}, which is not implemented",
        ),
        ({"moe": {"num_experts": 8}}, "moe is"),
    ],
)
def test_other_params_are_refused(tmp_path: Path, vocabulary: Path, params: dict[str, Any], message: str) -> None:
    """Rows 3 and 8; catches a model of nonsense, and a message that names no key and value."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, **params)
    refused(folder, tmp_path / "made", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("", "is empty"), ("[]", "not a JSON object"), ("{", "not a JSON")],
)
def test_params_that_cannot_be_read_are_refused(
    tmp_path: Path, vocabulary: Path, content: str | None, message: str
) -> None:
    """Row 3: known failed downloads."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary)
    (folder / "params.json").unlink()
    if content is not None:
        (folder / "params.json").write_text(content)
    refused(folder, tmp_path / "made", message)


def other_norm(parts: list[State]) -> None:
    parts[1]["norm.weight"][3] += 1


def other_head(parts: list[State]) -> None:
    parts[1]["layers.1.attention.wk.weight"][3] += 1


def lost(parts: list[State]) -> None:
    del parts[1]["norm.weight"]


def vision(parts: list[State]) -> None:
    for part in parts:
        part["vision_model.weight"] = torch.ones(3)


def thinner(parts: list[State]) -> None:
    parts[1]["layers.0.feed_forward.w1.weight"] = torch.ones(28, 63)


def integers(parts: list[State]) -> None:
    for part in parts:
        part["layers.0.feed_forward.w1.weight"] = part["layers.0.feed_forward.w1.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_norm, "consolidated.01.pth: norm.weight is not what consolidated.00.pth holds"),
        (other_head, "consolidated.01.pth: layers.1.attention.wk.weight is not what consolidated.00.pth holds"),
        (lost, "hold other tensors, such as norm.weight"),
        (vision, "1 unknown (vision_model.weight"),
        (thinner, "(28, 63) of torch.float32, which does not fit (28, 64)"),
        (integers, "layers.0.feed_forward.w1.weight is of torch.int8"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    tmp_path: Path, vocabulary: Path, change: Callable[[list[State]], Any], message: str
) -> None:
    """Rows 1 and 8; catches shards of two models, and tensors that are dropped in silence."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 4, change=change)
    refused(folder, tmp_path / "made", message)


def test_a_wrong_or_missing_tokenizer_is_refused(tmp_path: Path, vocabulary: Path) -> None:
    """Row 10; catches a folder that cannot encode, and LLaMA 2's tokenizer with Llama 3's embedding."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), None)
    refused(folder, tmp_path / "made", f"tokenizer.model is neither in {folder} nor in {tmp_path}")
    small = write_sentencepiece(folder, 350)
    convert(folder, tmp_path / "padded")
    assert "350 in the tokenizer, 384 rows" in (tmp_path / "padded" / "meta.json").read_text()
    sizes = Sizes(vocab=768)
    wide = write(tmp_path / "wide", random_state(sizes), sizes, small)
    refused(wide, tmp_path / "made", "(sentencepiece) has 350 tokens, the embedding 768 rows")
    write_sentencepiece(folder, 400)
    refused(folder, tmp_path / "made", "(sentencepiece) has 400 tokens, the embedding 384 rows")
    (folder / "tokenizer.model").write_text("<html>")
    refused(folder, tmp_path / "made", "is not a sentencepiece model")


def test_a_whole_destination_is_kept(tmp_path: Path, vocabulary: Path) -> None:
    """Rows 4 and 5; catches a model written over another, and one copied for nothing."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary)
    convert(folder, tmp_path / "made")
    before = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    with pytest.raises(UserError, match=r"already holds config\.json"):
        convert(folder, tmp_path / "made")
    with pytest.raises(CheckpointError, match="use it as it is"):
        convert(tmp_path / "made", tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before
    with pytest.raises(UserError, match=r"already holds params\.json"):
        convert(tmp_path / "made", folder, layout="meta")
    with pytest.raises(CheckpointError, match=f"one shard of a folder in Meta's layout, name the folder {folder}"):
        convert(folder / "consolidated.00.pth", tmp_path / "again")
    assert nothing_left(tmp_path / "again")


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    """Row 7; catches hours that end in "no space left"."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match="free"):
        convert(folder, tmp_path / "made", layout=layout)
    assert nothing_left(tmp_path / "made")


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path, vocabulary: Path) -> None:
    """Row 6; the message names what it would call and where."""
    folder = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary)
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    torch.save({"bomb": Bomb()}, folder / "consolidated.00.pth")
    refused(folder, tmp_path / "made", "'posix.mkdir' (byte ")
    assert not canary.exists()
