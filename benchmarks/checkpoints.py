"""Memory, disk and time of the streaming steps, on random weights with the shapes of LLaMA-13B.

python benchmarks/checkpoints.py --work_dir /tmp/checkpoints --layers 4 --tokenizer_model tokenizer.model

Memory is what a step holds beside the page cache: the most anonymous memory of its process, imports (0.15 GB) included.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lit_llama.cli import CLI
from lit_llama.folder.publish import write_json
from lit_llama.model.files.pth.files import write_pth

ROOT = Path(__file__).parent.parent
HIDDEN, INTERMEDIATE, HEADS, SHARDS = 5120, 13824, 40, 2
BASE_ROWS, ZIYA_ROWS = 32000, 39424


def main(*, work_dir: Path, tokenizer_model: Path, layers: int = 4) -> None:
    """Make Meta's files, convert them, make a delta, add and verify it, each in a process of its own.

    Args:
        work_dir: Folder for some 30 GB at 4 layers; it is removed at the end.
        tokenizer_model: LLaMA's tokenizer.model.
        layers: Of 40; each is 634 MB.
    """
    work_dir.mkdir(parents=True)
    try:
        meta, base, target, delta, merged = (work_dir / name for name in ("meta", "base", "target", "delta", "merged"))
        _write_meta(meta, layers, tokenizer_model)
        rows = [_measure("convert Meta's files", ["prepare/checkpoint.py", "--source", meta], base, meta)]
        _write_target(base, target)
        sides = ["--base_dir", base, "--target_dir", target]
        rows.append(_measure("make a delta", ["prepare/delta.py", "make", *sides], delta, base, target))
        sides = ["--base_dir", base, "--delta_dir", delta]
        rows.append(_measure("add the delta", ["prepare/delta.py", "apply", *sides], merged, base, delta))
        verify = ["prepare/delta.py", "verify", "--merged_dir", merged, *sides]
        rows.append(_measure("verify the sum", verify, None, merged))
        print(f"{'step':24}{'read':>9}{'written':>9}{'seconds':>9}{'peak memory':>13}")
        for name, read, written, seconds, memory in rows:
            print(f"{name:24}{read:>6.2f} GB{written:>6.2f} GB{seconds:>9.1f}{memory:>10.2f} GB")
    finally:
        shutil.rmtree(work_dir)


def _write_meta(folder: Path, layers: int, tokenizer_model: Path) -> None:
    """Two shards in Meta's layout: rows or columns of every matrix on each."""
    folder.mkdir()
    half, ffn = HIDDEN // SHARDS, INTERMEDIATE // SHARDS
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (BASE_ROWS, half), "norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for name, shape in {
            **dict.fromkeys(("attention.wq", "attention.wk", "attention.wv"), (half, HIDDEN)),
            "attention.wo": (HIDDEN, half),
            **dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (ffn, HIDDEN)),
            "feed_forward.w2": (HIDDEN, ffn),
            **dict.fromkeys(("attention_norm", "ffn_norm"), (HIDDEN,)),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    shapes["output.weight"] = (BASE_ROWS // SHARDS, HIDDEN)
    specs = {name: ("F16", shape) for name, shape in shapes.items()}

    def random(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name]).half()
        return (torch.randn(shapes[name]) * 0.02).half()

    for shard in range(SHARDS):
        write_pth(folder / f"consolidated.{shard:02d}.pth", specs, random)
    params = {"dim": HIDDEN, "multiple_of": 256, "n_heads": HEADS, "n_layers": layers, "norm_eps": 1e-6}
    write_json(folder / "params.json", params | {"vocab_size": -1})
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    names = [path.name for path in folder.iterdir()]
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))


def _write_target(base: Path, target: Path) -> None:
    """What training could have made of the base, with Ziya's rows and two more tokens."""
    target.mkdir()
    for path in base.iterdir():
        if path.suffix == ".json" or path.name == "tokenizer.model":
            shutil.copyfile(path, target / path.name)
    for name in ("meta.json", "model.safetensors.index.json", "tokenizer.json"):
        (target / name).unlink(missing_ok=True)
    write_json(target / "added_tokens.json", {"<human>": 32000, "<bot>": 32001})
    config = json.loads((base / "config.json").read_text())
    write_json(target / "config.json", config | {"vocab_size": ZIYA_ROWS})
    from lit_llama.model.files.shards import write_index
    from lit_llama.model.files.weights import Weights

    weights, shards, specs = Weights(base), {}, {}
    for number, name in enumerate(weights):
        value = weights[name]
        value = value + (torch.randn(value.shape) * 0.002).half()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = torch.cat((value, (torch.randn(ZIYA_ROWS - BASE_ROWS, HIDDEN) * 0.02).half()))
        file = f"model-{number:05d}.safetensors"
        save_file({name: value}, target / file, metadata={"format": "pt"})
        shards[file], specs[name] = [name], ("F16", tuple(value.shape))
    write_index(target, shards, specs)


def _measure(
    name: str, command: list[object], made: Path | None, *read: Path
) -> tuple[str, float, float, float, float]:
    """Run a script, looking at its memory all the time."""
    words = [sys.executable, str(ROOT / str(command[0])), *map(str, command[1:])]
    words += ["--destination_path", str(made)] if made else []
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT)
    most = 0
    while process.poll() is None:
        most = max(most, _anonymous(process.pid))
        time.sleep(0.002)
    assert process.returncode == 0, words
    seconds = time.perf_counter() - start
    return name, sum(map(_size, read)) / 1e9, _size(made) / 1e9 if made else 0.0, seconds, most / 1e9


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    CLI(main)
