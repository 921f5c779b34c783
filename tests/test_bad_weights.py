"""What users put where weights should be, through the doors: one line that says what, where, found and the way out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, write_adapter
from plain import Sizes, random_state, write_sentencepiece
from safetensors.torch import load_file, save_file
from test_delta import EMBEDDING, delta_of, folder_of, read, state_of
from test_meta import write, write_checklist

Folders = dict[str, Path]
Change = Callable[[Folders], Any]
HALF = torch.float16


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Every kind of folder, whole. Do not change it."""
    home = tmp_path_factory.mktemp("originals")
    shutil.copytree(tiny_folder, home / "model")
    state = load_file(tiny_folder / "model.safetensors")
    for name, index, write_part in (
        ("parts", "model.safetensors.index.json", lambda part, path: save_file(part, path, {"format": "pt"})),
        ("torch", "pytorch_model.bin.index.json", torch.save),
    ):
        shutil.copytree(tiny_folder, home / name)
        (home / name / "model.safetensors").unlink()
        weight_map = {}
        for part in (1, 2):
            file = index.replace(".index.json", "").replace(".", f"-{part:05d}-of-00002.")
            names = list(state)[part - 1 :: 2]
            write_part({key: state[key] for key in names}, home / name / file)
            weight_map |= dict.fromkeys(names, file)
        (home / name / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = Sizes()
    write(home / "meta", random_state(sizes, HALF), sizes, write_sentencepiece(home), shards=2)
    (home / "tokenizer.model").unlink()
    write_checklist(home / "meta")
    folder_of(home / "base", state_of(0, 370), tokenizer=False)
    folder_of(home / "delta", delta_of("ziya"))
    write_adapter(home / "adapter", home / "model")
    data = home / "data"
    data.mkdir()
    (data / "rows.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 4))
    rows = ("--data_file_name", "rows.json", "--test_split_size", 2, "--tokenizer_path", home / "model")
    assert run_here("prepare/alpaca.py", "--destination_path", data, *rows).returncode == 0
    return home


@pytest.fixture
def at(originals: Path, tmp_path: Path) -> Folders:
    """Copies that a test may change, by name, and `made`, which is not there."""
    folders = {path.name: Path(shutil.copytree(path, tmp_path / path.name)) for path in originals.iterdir()}
    edit(folders["adapter"] / "adapter_config.json", base_model_name_or_path=str(folders["model"]))
    return folders | {"made": tmp_path / "made"}


def door(name: str, at: Folders, folder: str) -> tuple[object, ...]:
    """The command of a user who takes `folder` for what it is called."""
    made, path = ("--destination_path", at["made"]), at[folder]
    sides = {"base": at["base"], "delta": at["delta"]}
    train = ("--data_dir", at["data"], "--out_dir", at["made"], "--train.max_steps", 1)
    return {
        "convert": ("prepare/checkpoint.py", "--source", path, *made),
        "round": ("prepare/checkpoint.py", "--source", path, *made, "--dtype", "float16"),
        "base": ("prepare/delta.py", "apply", "--base_dir", path, "--delta_dir", sides["delta"], *made),
        "delta": ("prepare/delta.py", "apply", "--base_dir", sides["base"], "--delta_dir", path, *made),
        "merge": ("finetune/merge.py", "--adapter_dir", path, *made, "--precision", "32-true"),
        "finetune": (
            "finetune/lora.py",
            "--checkpoint_dir",
            path,
            *train,
            "--train.batch_size",
            1,
            "--precision",
            "32-true",
        ),
        "generate": ("generate/base.py", "--checkpoint_dir", path, "--max_new_tokens", 1, "--precision", "32-true"),
        "instruct": ("generate/instruct.py", "--checkpoint_dir", path, "--precision", "32-true"),
        "chat": ("generate/chat.py", "--checkpoint_dir", path, "--precision", "32-true"),
    }[name]


def refused(at: Folders, status: int, words: tuple[str, ...], *command: object) -> None:
    """One line with all of these words, the right status, and nothing that looks whole."""
    done = run_here(*command)
    assert done.returncode == status, done
    lines = done.stderr.rstrip("\n").split("\n")
    assert lines[-1].startswith("error: ") and not any("error: " in line for line in lines[:-1]), done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for word in words:
        assert word.format(**at) in lines[-1], (word, lines[-1])
    made = at["made"]
    assert not made.exists() or not {"config.json", "adapter_config.json", "SHA256SUMS"} & set(os.listdir(made))
    assert not list(made.parent.glob(".made.partial*"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def run(at: Folders) -> None:
        path = next(at[folder].glob("*model.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return run


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269062936\n",
    "page": lambda content: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "cut off": lambda content: content[: len(content) // 2],
    "flipped": lambda content: bytes([content[0] ^ 0x40]) + content[1:],
    "not text": lambda content: b"\xff\xfe" + content,
    "nested": lambda content: b"[" * 100_000,
}
FILES = [
    ("model", "config.json", "generate"),
    ("model", "model.safetensors", "round"),
    ("model", "tokenizer.json", "finetune"),
    ("parts", "config.json", "round"),
    ("parts", "model.safetensors.index.json", "generate"),
    ("parts", "model-00002-of-00002.safetensors", "generate"),
    ("torch", "config.json", "convert"),
    ("torch", "pytorch_model.bin.index.json", "convert"),
    ("torch", "pytorch_model-00002-of-00002.bin", "convert"),
    ("meta", "params.json", "convert"),
    ("meta", "tokenizer.model", "convert"),
    ("meta", "consolidated.01.pth", "convert"),
    ("base", "config.json", "base"),
    ("base", "model.safetensors", "base"),
    ("delta", "tokenizer.json", "delta"),
    ("adapter", "adapter_config.json", "merge"),
    ("adapter", "adapter_model.safetensors", "merge"),
    ("adapter", "meta.json", "generate"),
]


@pytest.mark.parametrize(("folder", "file", "command"), FILES, ids=[f"{folder}/{file}" for folder, file, _ in FILES])
def test_a_damaged_file_is_named(at: Folders, folder: str, file: str, command: str) -> None:
    """Catches tracebacks of parsers, and a failed download that passes for weights, settings or tokenizer."""
    (at["meta"] / "checklist.chk").unlink()
    path = at[folder] / file
    content = path.read_bytes()
    for damage in DAMAGE.values():
        path.write_bytes(damage(content))
        refused(at, 4, (str(path),), *door(command, at, folder))


def test_a_piece_that_is_no_text_is_named(at: Folders) -> None:
    """Catches a UnicodeDecodeError out of a tokenizer.model with one flipped bit, which sentencepiece loads."""
    (at["meta"] / "checklist.chk").unlink()
    path = at["meta"] / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[content.index("▁".encode())] ^= 0x40
    path.write_bytes(content)
    refused(at, 4, (str(path),), *door("convert", at, "meta"))


@pytest.mark.parametrize("content", ["<!DOCTYPE html><html></html>", "version https://git-lfs.github.com/spec/v1", ""])
def test_a_template_that_leaves_out_the_question_is_refused(at: Folders, content: str) -> None:
    """Catches a page taken for a chat template: the model would answer every question alike, and nobody knew why."""
    (at["model"] / "chat_template.jinja").write_text(content)
    refused(at, 4, ("leaves out the user message", "--prompt_style"), *door("instruct", at, "model"))


@pytest.mark.parametrize("folder", ["parts", "torch"])
@pytest.mark.parametrize("way", ["above", "absolute", "link", "pipe", "folder"])
def test_an_index_cannot_lead_elsewhere(at: Folders, folder: str, way: str) -> None:
    """Catches a file outside the folder that is read because data names it, and a pipe that is waited for."""
    path = at[folder]
    index = next(path.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    file = sorted(set(weight_map.values()))[1]
    outside = path.parent / file
    (path / file).rename(outside)
    named = {"above": f"../{file}", "absolute": str(outside)}.get(way, file)
    if way == "link":
        (path / file).symlink_to(outside)
    elif way == "pipe":
        os.mkfifo(path / file)
    elif way == "folder":
        (path / file).mkdir()
    text = json.dumps({"metadata": {}, "weight_map": {k: named if v == file else v for k, v in weight_map.items()}})
    index.write_text(text)
    command = "generate" if folder == "parts" else "convert"
    refused(at, 4, (str(index), named, "no file in"), *door(command, at, folder))


@pytest.mark.parametrize(
    ("command", "folder", "file"),
    [("merge", "adapter", "adapter_model.safetensors"), ("round", "model", "model.safetensors")],
)
def test_a_pipe_is_not_waited_for(at: Folders, command: str, folder: str, file: str) -> None:
    """Catches a command that hangs for ever without a word."""
    (at[folder] / file).unlink()
    os.mkfifo(at[folder] / file)
    refused(at, 4, (file,), *door(command, at, folder))


def lose(folder: str, file: str) -> Change:
    return lambda at: (at[folder] / file).unlink()


def no_checklist(change: Change) -> Change:
    return lambda at: ((at["meta"] / "checklist.chk").unlink(), change(at))


def put(folder: str, **values: Any) -> Change:
    return lambda at: edit(at[folder] / "config.json", **values)


def flip_last(folder: str, file: str) -> Change:
    def run(at: Folders) -> None:
        content = bytearray((at[folder] / file).read_bytes())
        content[len(content) // 2] ^= 1
        (at[folder] / file).write_bytes(content)

    return run


def tiktoken(at: Folders) -> None:
    (at["meta"] / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n" * 50)


def convert_first(at: Folders) -> None:
    assert run_here(*door("convert", at, "meta")).returncode == 0
    (at["made"] / "config.json").rename(at["made"] / "config.json.kept")
    (at["made"] / "params.json").write_text("{}")


CONVERT: list[tuple[str, str, Change, int, tuple[str, ...]]] = [
    (
        "1 missing shard",
        "meta",
        no_checklist(lose("meta", "consolidated.00.pth")),
        4,
        ("found consolidated.01.pth", "missing is consolidated.00.pth"),
    ),
    (
        "1 missing last shard",
        "meta",
        no_checklist(lose("meta", "consolidated.01.pth")),
        4,
        ("dim is 64", "32 rows in 1 shard"),
    ),
    (
        "1 listed shard",
        "meta",
        lose("meta", "consolidated.01.pth"),
        6,
        ("lists consolidated.01.pth, which is missing",),
    ),
    (
        "1 missing part",
        "torch",
        lose("torch", "pytorch_model-00002-of-00002.bin"),
        4,
        ("missing are pytorch_model-00002-of-00002.bin",),
    ),
    (
        "2 checksum",
        "meta",
        flip_last("meta", "consolidated.01.pth"),
        6,
        ("consolidated.01.pth: md5 expected", "got", "download it again"),
    ),
    (
        "3 empty params",
        "meta",
        no_checklist(lambda at: (at["meta"] / "params.json").write_text("")),
        4,
        ("params.json is empty",),
    ),
    (
        "3 no params",
        "meta",
        no_checklist(lose("meta", "params.json")),
        4,
        ("params.json does not exist", "download it again"),
    ),
    (
        "3 other params",
        "meta",
        no_checklist(lambda at: edit(at["meta"] / "params.json", dim=128)),
        4,
        ("dim is 128, but wq has 64 columns",),
    ),
    (
        "4 nothing to do",
        "model",
        lambda at: None,
        4,
        ("already is a checkpoint folder in Hugging Face layout", "use it as it is"),
    ),
    ("4 an adapter", "adapter", lambda at: None, 4, ("is an adapter", "finetune/merge.py")),
    ("8 experts", "torch", put("torch", model_type="mixtral"), 4, ("model_type is 'mixtral'", "llama, mistral")),
    (
        "8 quantised",
        "torch",
        put("torch", quantization_config={"bits": 4}),
        4,
        ("quantization_config is {{'bits': 4}}",),
    ),
    (
        "10 no tokenizer",
        "meta",
        no_checklist(lose("meta", "tokenizer.model")),
        4,
        ("tokenizer.model is neither in", "499,723 bytes"),
    ),
    ("10 tiktoken", "meta", no_checklist(tiktoken), 4, ("tokenizer.model",)),
]


@pytest.mark.parametrize(
    ("folder", "change", "status", "words"), [row[1:] for row in CONVERT], ids=[r[0] for r in CONVERT]
)
def test_convert_says_what_is_wrong(at: Folders, folder: str, change: Change, status: int, words: Any) -> None:
    """What goes wrong on the way into the layout; catches tracebacks and messages without a way out."""
    change(at)
    refused(at, status, words, *door("convert", at, folder))


def test_convert_does_nothing_twice(at: Folders) -> None:
    """Catches a whole folder that is written over (5), and one layout laid over another."""
    assert run_here(*door("convert", at, "meta")).returncode == 0
    before = {path.name: path.read_bytes() for path in at["made"].iterdir()}
    done = run_here(*door("convert", at, "meta"))
    assert done.returncode == 2 and "already holds config.json" in done.stderr
    assert before == {path.name: path.read_bytes() for path in at["made"].iterdir()}


def test_a_foreign_global_is_named_with_its_place(at: Folders) -> None:
    """Catches a pickle that runs (6)."""
    canary = at["made"].with_name("canary")

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    torch.save({"model.norm.weight": torch.ones(64), "x": Bomb()}, at["torch"] / "pytorch_model-00002-of-00002.bin")
    words = ("pytorch_model-00002-of-00002.bin", "the global 'posix.mkdir'", "(byte ", "safetensors")
    refused(at, 4, words, *door("convert", at, "torch"))
    assert not canary.exists()


def test_values_too_large_are_counted(at: Folders) -> None:
    """Catches infinities that --dtype float16 would make (9)."""
    change_tensors("model", lambda tensors: tensors["model.norm.weight"].view(-1)[:3].fill_(1e6))(at)
    refused(at, 4, ("3 values of model.norm.weight", "--dtype bfloat16"), *door("round", at, "model"))


@pytest.mark.parametrize(("command", "folder"), [("convert", "meta"), ("delta", "delta"), ("merge", "adapter")])
def test_a_full_disk_is_told_in_numbers(
    at: Folders, command: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours that end in `no space left on device` (7 of convert, 10 of merge)."""
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10_000, 10_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    refused(at, 5, ("GB free", "GB are needed", "another disk"), *door(command, at, folder))


def swap(at: Folders) -> None:
    at["base"], at["delta"] = at["delta"], at["base"]


def whole_as_delta(at: Folders) -> None:
    tuned = {name: (value.float() * 1.01).half() for name, value in state_of(0, 384).items()}
    tuned |= {EMBEDDING: state_of(3, 384)[EMBEDDING]}
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], tuned)


def merged_as_base(at: Folders) -> None:
    assert run_here(*door("delta", at, "delta")).returncode == 0
    shutil.rmtree(at["base"])
    at["made"].rename(at["base"])


def other_size(at: Folders) -> None:
    shutil.rmtree(at["base"])
    wide = {name: value for name, value in state_of(0, 370).items() if "layers.1." not in name}
    folder_of(at["base"], wide, num_hidden_layers=1)


def small_embedding(at: Folders) -> None:
    state = delta_of("vicuna")
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], state)


def rounded(at: Folders) -> None:
    state = {name: value.bfloat16().half() for name, value in read(at["base"]).items()}
    save_file(state, at["base"] / "model.safetensors", metadata={"format": "pt"})


def half_a_file(at: Folders) -> None:
    path = at["delta"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


DELTA: list[tuple[str, Change, int, tuple[str, ...]]] = [
    ("1 swapped", swap, 4, ("seem swapped", "--base_dir is the model")),
    ("1 the same path", lambda at: at.update(base=at["delta"]), 4, ("hold the same embedding of 384 rows",)),
    ("2 a whole model", whole_as_delta, 4, ("no delta but a whole model", "use it as it is")),
    ("3 merged already", merged_as_base, 4, ("{base} is merged already", "--base_dir needs the original weights")),
    ("4 another size", other_size, 4, ("another size", "{base} has 1 layers of width 64", "{delta} has 2 layers")),
    ("5 rows differ", small_embedding, 4, ("384 embedding rows", "370", "--policy vicuna", "--policy alpaca")),
    ("6 once bfloat16", rounded, 4, ("went through bfloat16", "prepare/checkpoint.py", "--accept_rounded_base")),
    ("7 partly downloaded", half_a_file, 4, ("{delta}/model.safetensors",)),
    ("8 target is the base", lambda at: at.update(made=at["base"]), 2, ("{base} already exists", "nothing is ever")),
    ("an adapter as base", lambda at: at.update(base=at["adapter"]), 4, ("is an adapter", "finetune/merge.py")),
]


@pytest.mark.parametrize(("change", "status", "words"), [row[1:] for row in DELTA], ids=[row[0] for row in DELTA])
def test_delta_says_what_is_wrong(at: Folders, change: Change, status: int, words: Any) -> None:
    """The catalogue of wrong pairs; catches a sum of nonsense, which nothing but its answers would show."""
    change(at)
    before = {path: path.read_bytes() for name in ("base", "delta") for path in at[name].iterdir()}
    command = door("delta", at, "delta")
    if at["made"] == at["base"]:
        at = at | {"made": at["made"].with_name("nothing")}
    refused(at, status, words, *command)
    assert before == {path: path.read_bytes() for path in before}


def other_base(at: Folders) -> None:
    change_tensors("model", lambda tensors: tensors["model.norm.weight"].mul_(1.5))(at)


def adapter_setting(**values: Any) -> Change:
    return lambda at: edit(at["adapter"] / "adapter_config.json", **values)


ADAPTER: list[tuple[str, Change, int, tuple[str, ...]]] = [
    ("9 another base", other_base, 6, ("{model} is not the base", "fingerprint")),
    ("9 another shape", adapter_setting(r=5), 4, ("adapter_model.safetensors", "lora_A is (4, ", "r 5 needs (5, ")),
    ("9 DoRA", adapter_setting(use_dora=True), 4, ("14 missing", "lora_magnitude_vector")),
    ("9 rank 0", adapter_setting(r=0), 4, ("r is 0, expected a whole number of 1 or more",)),
    (
        "9 an adapter as base",
        lambda at: edit(at["adapter"] / "adapter_config.json", base_model_name_or_path=str(at["adapter"])),
        4,
        ("is no checkpoint folder",),
    ),
    (
        "9 zeros",
        change_tensors("adapter", lambda tensors: [value.zero_() for value in tensors.values()]),
        4,
        ("only zeros", "never trained"),
    ),
    ("8 the target is whole", lambda at: at.update(made=at["model"]), 2, ("{model} already holds config.json",)),
]


@pytest.mark.parametrize(("change", "status", "words"), [row[1:] for row in ADAPTER], ids=[row[0] for row in ADAPTER])
def test_merge_says_what_is_wrong(at: Folders, change: Change, status: int, words: Any) -> None:
    """The catalogue of adapters that do not fit; catches updates left out in silence, or added to other weights."""
    change(at)
    command = door("merge", at, "adapter")
    if at["made"] == at["model"]:
        at = at | {"made": at["made"].with_name("nothing")}
    refused(at, status, words, *command)


@pytest.mark.parametrize("policy", ["ziya", "add"])
@pytest.mark.parametrize("command", ["generate", "finetune", "chat"])
def test_a_delta_is_no_model(at: Folders, command: str, policy: Any) -> None:
    """Catches a delta that is run or tuned as it is: it loads, and talks nonsense."""
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], delta_of(policy))
    words = (
        "{delta} holds a delta and no model",
        "norms are near zero",
        "prepare/delta.py apply",
        "--delta_dir {delta}",
    )
    refused(at, 4, words, *door(command, at, "delta"))


def test_torch_files_are_named_with_the_way_in(at: Folders) -> None:
    """Catches a downloaded folder, a delta of Ziya's say, that is run as it is and refused without a word of help."""
    words = ("has no model.safetensors", "prepare/checkpoint.py --source {torch}", "prepare/delta.py apply")
    refused(at, 4, words, *door("generate", at, "torch"))


@pytest.mark.parametrize("command", ["round", "finetune", "base"])
def test_an_adapter_is_no_base(at: Folders, command: str) -> None:
    """Catches an adapter folder named as a model, and an advice to download what is there."""
    refused(at, 4, ("{adapter}", "is an adapter", "finetune/merge.py"), *door(command, at, "adapter"))
