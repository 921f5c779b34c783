"""Meta's layout: shards cut here row by row, joined, and compared with Meta's model as it is written in plain.py."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from plain import Sizes, State, logits, native, random_state, write_sentencepiece
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.convert import convert
from lit_llama.convert.meta import reader as meta
from lit_llama.convert.meta import writer as meta_writer
from lit_llama.convert.meta.join import Joined
from lit_llama.convert.meta.reader import open_meta
from lit_llama.convert.meta.writer import ffn_width, write_meta
from lit_llama.convert.native import open_folder
from lit_llama.convert.pth.files import read_pth
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError
from lit_llama.model.checkpoint import load_model

IDS = torch.arange(3, 40)
COLUMNS = {"wo", "w2"}
ROWS = {"wq", "wk", "wv", "w1", "w3", "output"}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 384 pieces, as many as the tiny models have rows."""
    return write_sentencepiece(tmp_path_factory.mktemp("vocabulary"))


def cut(state: State, sizes: Sizes, shards: int, embedding: str) -> list[State]:
    """What each shard holds, as fairscale's layers keep it: all shards see one storage of their own, as Meta's do."""
    found: list[State] = []
    for shard in range(shards):
        parts: State = {"rope.freqs": torch.ones(sizes.head // 2).to(state["norm.weight"])}
        for name, whole in state.items():
            kind = name.split(".")[-2]
            how = (
                embedding
                if kind == "tok_embeddings"
                else "rows"
                if kind in ROWS
                else "columns"
                if kind in COLUMNS
                else ""
            )
            if kind in ("wk", "wv") and shards > sizes.n_kv_heads:  # each head is in several shards
                head = shard * sizes.n_kv_heads // shards
                parts[name] = whole[head * sizes.head : (head + 1) * sizes.head]
            elif how:
                size = whole.shape[how == "columns"] // shards
                span = slice(shard * size, (shard + 1) * size)
                parts[name] = whole[span] if how == "rows" else whole[:, span]
            else:
                parts[name] = whole
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        at = 0
        for name, part in parts.items():
            parts[name] = flat[at : at + part.numel()].view(part.shape)
            at += part.numel()
        found.append(parts)
    return found


def write(
    folder: Path,
    state: State,
    sizes: Sizes,
    vocabulary: Path | None,
    shards: int = 1,
    embedding: str = "columns",
    change: Callable[[list[State]], Any] = lambda parts: None,
    **params: Any,
) -> Path:
    """A folder as Meta publishes it, but for checklist.chk."""
    folder.mkdir(parents=True)
    parts = cut(state, sizes, shards, embedding)
    change(parts)
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    values: dict[str, Any] = {"dim": sizes.dim, "multiple_of": 16, "n_heads": sizes.n_heads, "n_layers": sizes.n_layers}
    values |= {"norm_eps": sizes.norm_eps, "vocab_size": -1}
    if sizes.n_kv_heads != sizes.n_heads:
        values["n_kv_heads"] = sizes.n_kv_heads
    if sizes.rope_theta != 10000.0:
        values["rope_theta"] = sizes.rope_theta
    if sizes.factor:
        values |= {"use_scaled_rope": True, "rope_scaling_factor": sizes.factor}
    values = {name: value for name, value in (values | params).items() if value != "absent"}
    (folder / "params.json").write_text(json.dumps(values))
    if vocabulary:
        (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return folder


def write_checklist(folder: Path) -> None:
    names = [path.name for path in sorted(folder.iterdir())]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(lines))


def equal(found: State, wanted: State) -> bool:
    """Names, dtypes and every bit."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def nothing_left(destination: Path) -> bool:
    return not destination.exists() and not list(destination.parent.glob(f".{destination.name}*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shards", "kv_heads", "embedding"),
    [
        (1, 4, "rows"),
        (2, 4, "columns"),
        (2, 4, "rows"),
        (4, 4, "columns"),
        (4, 2, "rows"),
        (4, 1, "columns"),
        (2, 1, "rows"),
    ],
)
def test_shards_become_the_model_they_were_cut_from(
    tmp_path: Path, vocabulary: Path, shards: int, kv_heads: int, embedding: str, dtype: torch.dtype
) -> None:
    """Catches a wrong dimension, order, permutation or name, a copy of a key/value head that is kept, a value that is
    rounded, and a tensor that drags the storage of its whole shard along."""
    sizes = Sizes(n_kv_heads=kv_heads)
    state = random_state(sizes, dtype)
    source = write(tmp_path / "meta", state, sizes, vocabulary, shards, embedding)
    convert(source, tmp_path / "made")
    assert equal(load_file(tmp_path / "made" / "model.safetensors"), native(state, sizes))
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.") and config["num_key_value_heads"] == kv_heads


MODELS = {
    "LLaMA 1": Sizes(n_kv_heads=4, norm_eps=1e-6),
    "LLaMA 2": Sizes(),
    "Llama 3": Sizes(rope_theta=500000.0),
    "Llama 3.1": Sizes(rope_theta=500000.0, factor=8.0),
    "Llama 3.2": Sizes(rope_theta=500000.0, factor=32.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_says_what_metas_does(tmp_path: Path, vocabulary: Path, name: str) -> None:
    """Catches a wrong epsilon, theta or scaling of the rotary frequencies; here, and in transformers."""
    from transformers import AutoModelForCausalLM

    sizes = MODELS[name]
    state = random_state(sizes, tied=name == "Llama 3.2")
    wanted = logits(state, sizes, IDS)
    convert(write(tmp_path / "meta", state, sizes, vocabulary, 2), tmp_path / "made")
    assert (load_model(tmp_path / "made")(IDS) - wanted).abs().max() <= 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert (theirs(IDS[None]).logits[0] - wanted).abs().max() <= 1e-4
    other = logits(state, replace(sizes, rope_theta=9000.0, factor=0.0), IDS)
    assert (other - wanted).abs().max() > 0.01, "these positions must tell one theta from another"


def swapped(weight: Tensor, heads: int) -> Tensor:
    """The permutation in the other direction."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("permute", [swapped, lambda weight, heads: weight])
def test_a_wrong_permutation_would_be_seen(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, permute: Callable[[Tensor, int], Tensor]
) -> None:
    """Guards the tests above: with heads of 16 neither direction is its own inverse."""
    sizes = Sizes()
    state = random_state(sizes)
    monkeypatch.setattr("lit_llama.convert.rotary.halves_from_pairs", permute)
    convert(write(tmp_path / "meta", state, sizes, vocabulary, 2), tmp_path / "made")
    assert (load_model(tmp_path / "made")(IDS) - logits(state, sizes, IDS)).abs().max() > 0.1


@pytest.mark.parametrize("name", [*sorted(COLUMNS), *sorted(ROWS)])
def test_a_wrong_dimension_would_be_seen(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Guards the tests above: no tensor has the shape of its transpose once two shards are laid together wrongly."""
    source = write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary, 2)
    monkeypatch.setitem(meta.SPLIT, name, 1 - meta.SPLIT[name])
    with pytest.raises(CheckpointError):
        open_meta(source)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", ["LLaMA 1", "Llama 3.2"])
def test_there_and_back_is_the_same_to_the_last_bit(tmp_path: Path, vocabulary: Path, name: str, shards: int) -> None:
    """Catches a permutation that is not undone, an embedding cut the other way, copies of heads that are lost, and a
    params.json that describes another model."""
    sizes = MODELS[name]
    state = random_state(sizes, torch.float16, tied=name == "Llama 3.2")
    embedding = "columns" if name == "LLaMA 1" else "rows"
    source = write(tmp_path / "meta", state, sizes, vocabulary, shards, embedding)
    convert(source, tmp_path / "made")
    convert(tmp_path / "made", tmp_path / "back", layout="meta", num_shards=shards)
    for i, wanted in enumerate(cut(state, sizes, shards, embedding)):
        del wanted["rope.freqs"]
        assert equal(torch.load(tmp_path / "back" / f"consolidated.{i:02d}.pth", weights_only=True), wanted)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == vocabulary.read_bytes()
    subprocess.run(["md5sum", "-c", "--status", "checklist.chk"], cwd=tmp_path / "back", check=True)
    again, first = open_meta(tmp_path / "back"), open_meta(source)
    assert again.config == first.config and again.notes["family"] == first.notes["family"]
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert ffn_width(sizes.dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == sizes.ffn


@pytest.mark.parametrize(
    ("dim", "multiple", "multiplier", "width"),
    [
        (4096, 256, None, 11008), (5120, 256, None, 13824), (6656, 256, None, 17920), (8192, 256, None, 22016),
        (8192, 4096, 1.3, 28672), (4096, 1024, 1.3, 14336), (2048, 256, 1.5, 8192), (3072, 256, 1.0, 8192),
        (16384, 4096, 1.2, 53248),
    ],
)  # fmt: skip
def test_the_width_of_the_mlp_is_metas(dim: int, multiple: int, multiplier: float | None, width: int) -> None:
    """Every published size; catches a params.json from which Meta's code would build another width."""
    assert ffn_width(dim, multiple, multiplier) == width
    assert ffn_width(dim, *meta_writer._width(dim, width)) == width
    assert ffn_width(dim, *meta_writer._width(dim, 1000)) == 1000


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-6}, 2048, None),
        ({"dim": 6656, "n_heads": 52, "norm_eps": 1e-5}, 2048, None),
        ({"dim": 8192, "n_heads": 64, "norm_eps": 1e-5}, 2048, None),  # 65B
        ({"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5}, 4096, None),  # LLaMA 2 70B
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5}, 4096, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 1e6}, 16384, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5}, 8192, None),
        ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 8.0),
        ({"dim": 2048, "n_heads": 32, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 32.0),
        ({"dim": 3072, "n_heads": 24, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, 131072, 32.0),
    ],
)
def test_what_params_leave_unsaid_follows_from_the_family(
    params: dict[str, Any], context: int, factor: float | None
) -> None:
    """Catches a model that is cut off at another's context, or stretched by another's factor."""
    assert meta._family(params).context == context
    rope = meta._rope_scaling(params, tied=False)
    assert (rope.factor if rope else None) == factor


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path: Path, vocabulary: Path) -> None:
    """Catches a matrix stored twice, and two alike but for one value that are taken for one."""
    state = random_state(Sizes(), tied=True)
    convert(write(tmp_path / "meta", state, Sizes(), vocabulary), tmp_path / "made")
    assert "lm_head.weight" not in load_file(tmp_path / "made" / "model.safetensors")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"]
    state["output.weight"][-1, -1] += 1
    convert(write(tmp_path / "other", state, Sizes(), vocabulary), tmp_path / "apart")
    assert not json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"]


def test_the_folder_opens_in_transformers_with_its_tokenizer(tmp_path: Path, llama_tokenizer: Path) -> None:
    """LLaMA's own tokenizer; catches text that other programs encode otherwise, or without the token that begins it."""
    import sentencepiece
    from transformers import AutoTokenizer, GenerationConfig

    sizes = Sizes(vocab=32000)
    source = write(tmp_path / "7B", random_state(sizes), sizes, None)
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer.read_bytes())  # above the weights, as Meta has it
    convert(source, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer))
    for text in ("Hello", "Zoë's naïve café, 北京 is a city. 😀", "a\n\n  b", "1 + 23 = 24"):
        assert tokenizer(text)["input_ids"] == [1, *original.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert GenerationConfig.from_pretrained(tmp_path / "made").eos_token_id in (2, [2])
    notes = json.loads((tmp_path / "made" / "meta.json").read_text())["source"]
    assert notes["family"] == "LLaMA 2" and notes["tokens"].startswith("32000 in the tokenizer")


def test_the_hubs_folder_of_metas_files_is_found(tmp_path: Path, vocabulary: Path) -> None:
    """Catches `original/` that must be named, and settings nested under "model" that are not seen."""
    write(tmp_path / "hub" / "original", random_state(Sizes()), Sizes(), vocabulary)
    path = tmp_path / "hub" / "original" / "params.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text())}))
    convert(tmp_path / "hub", tmp_path / "made")
    assert load_model(tmp_path / "made").config.num_key_value_heads == 2


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


def test_nothing_is_rounded_unless_asked_for(tmp_path: Path, vocabulary: Path) -> None:
    """Row 9; catches values that become infinite in float16."""
    state = random_state(Sizes())
    state["layers.1.feed_forward.w2.weight"][5, 7] = 70000.0
    folder = write(tmp_path / "meta", state, Sizes(), vocabulary, 2)
    with pytest.raises(CheckpointError, match=r"1 values of model\.layers\.1\.mlp\.down_proj\.weight are too large"):
        convert(folder, tmp_path / "made", dtype="float16")
    assert nothing_left(tmp_path / "made")
    convert(folder, tmp_path / "made", dtype="bfloat16", max_shard_size=100_000)
    assert load_model(tmp_path / "made").lm_head.weight.dtype == torch.bfloat16
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 1


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


@pytest.mark.parametrize("shards", [3, 8])
def test_shards_that_do_not_divide_the_model_are_refused(tmp_path: Path, vocabulary: Path, shards: int) -> None:
    """Catches a head cut in two."""
    source = open_meta(write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary))
    with pytest.raises(UserError, match=f"--num_shards is {shards}, which does not divide num_attention_heads 4"):
        write_meta(source, tmp_path / "back", shards)
    assert nothing_left(tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "head_dim is 24"),
        ({"attention_bias": True, "attention_out_bias": True}, "proj.bias has no place"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64"),
    ],
)
def test_what_metas_code_cannot_compute_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Catches a model that Meta's code would read and compute otherwise."""
    from conftest import tiny_model
    from safetensors.torch import save_file

    model = tiny_model(**changes)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict("float32")))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        write_meta(open_folder(folder), tmp_path / "back")
    assert nothing_left(tmp_path / "back")


def test_memory_holds_a_tensor_and_not_the_model(tmp_path: Path, llama_tokenizer: Path) -> None:
    """600 MB in two shards; catches shards that are loaded, or mapped and counted, whole."""
    sizes = Sizes(dim=1024, n_heads=8, n_kv_heads=8, ffn=4096, n_layers=14, vocab=32000)
    base = random_state(replace(sizes, n_layers=1), torch.float16)
    layers = {name: value for name, value in base.items() if name.startswith("layers.")}
    for i in range(1, sizes.n_layers):
        base |= {name.replace("layers.0.", f"layers.{i}."): value.clone() for name, value in layers.items()}
    folder = write(tmp_path / "meta", base, sizes, llama_tokenizer, 2)
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    assert size > 5.5e8
    code = f"""
from pathlib import Path
from lit_llama.convert import convert, native
from lit_llama.convert.lit import lit_llama as lit
from lit_llama.convert.meta import reader as meta
from lit_llama.convert.meta import writer as meta_writer
from lit_llama.convert.tokens import files as vocabulary
import torch, sentencepiece, lit_llama.model.llama
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
convert(Path({str(folder)!r}), Path({str(tmp_path / "made")!r}))
print(peak() - before)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(done.stdout) * 1024
    assert grown < size / 2, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB, whose largest tensor has 66 MB"
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (5, 6), (3, 40), (15, 17), (47, 48), (20, 20)])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_rows_of_a_joined_tensor_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int, start: int, stop: int | None
) -> None:
    """Catches a border between parts, or between the blocks they are read in, that is off by one."""
    whole = torch.randn(48, 12)
    for i, part in enumerate(whole.chunk(3, dim)):
        torch.save({"x": part}, tmp_path / f"{i}.pth")  # a column of parts is a view with strides
    parts = [read_pth(tmp_path / f"{i}.pth")["x"] for i in range(3)]
    monkeypatch.setattr("lit_llama.convert.meta.join._BLOCK", 7 * 48)
    assert torch.equal(Joined("x", parts, dim).read(start, stop), whole[start:stop])
    doubled = Joined("x", [part for part in parts for _ in range(2)], dim, copies=2)
    assert doubled.shape == (48, 12) and torch.equal(doubled.read(start, stop), whole[start:stop])
