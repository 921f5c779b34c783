"""Memory that fine-tuning on the processor takes, against what its plan says before.

python benchmarks/memory.py --data_dir data/demo --out memory

Every setting is two processes: the plan, and a run of a few steps, of which the kernel says how much it held at most.
"""

import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # this folder is no installed package

from benchmarks.training.process import run
from lit_llama.cli import CLI
from lit_llama.errors import UserError

SETTINGS = {
    "bf16-true": "lora --precision bf16-true",
    "32-true": "lora --precision 32-true",
    "bf16-mixed": "lora --precision bf16-mixed",
    "nf4": "lora --quantize nf4",
    "nf4-dq": "lora --quantize nf4-dq",
    "int8": "lora --quantize int8",
    "selective": "lora --train.activation_checkpointing selective",
    "full checkpointing": "lora --train.activation_checkpointing full",
    "rank 2 of q and v": "lora --lora.r 2 --lora.target_modules [q_proj,v_proj]",
    "rank 64": "lora --lora.r 64",
    "dropout": "lora --lora.dropout 0.05",
    "DoRA": "lora --lora.use_dora true",
    "embeddings": "lora --lora.modules_to_save [embed_tokens]",
    "512 tokens at once": "lora --train.micro_batch_tokens 512",
    "8192 tokens at once": "lora --train.micro_batch_tokens 8192",
    "NEFTune": "lora --train.neftune_noise_alpha 5",
    "keep best": "lora --train.keep best",
    "8-bit optimizer": "lora --train.optimizer adamw_8bit",
    "all weights": "full --precision bf16-true",
    "all weights in bf16-mixed": "full --precision bf16-mixed",
}
"""The script in finetune/, and its flags."""
_SIZE = r"(\d+\.\d+)"


def main(
    *,
    checkpoint_dir: Path = Path("checkpoints/smollm2-135m-instruct"),
    data_dir: Path = Path("data/demo"),
    only: list[str] | None = None,
    steps: int = 3,
    batch_size: int = 8,
    sample_prompts: int = 1,
    out: Path | None = None,
) -> None:
    """Print the plan of each setting, what its run held, and the difference.

    Args:
        checkpoint_dir: Base model.
        data_dir: Data folder made by prepare/.
        only: Some of the settings, by their names in the table.
        steps: Of each run.
        batch_size: Samples of each step.
        sample_prompts: Prompts that each run answers before and after.
        out: Writes OUT.json.
    """
    if unknown := [name for name in only or () if name not in SETTINGS]:
        raise UserError(f"--only has {unknown[0]!r}, expected some of {', '.join(map(repr, SETTINGS))}")
    found = {}
    print(f"{'':22}{'planned':>9}{'at most':>9}{'measured':>10}{'':>8}   GB")
    for name in only or SETTINGS:
        script, *flags = shlex.split(SETTINGS[name])
        given = [*flags, "--train.max_steps", str(steps), "--train.batch_size", str(batch_size)]
        given += ["--train.sample_prompts", str(sample_prompts)]
        found[name] = line = _measure(script, checkpoint_dir, data_dir, given)
        off = line["measured"] / line["planned"] - 1
        most = f"{line['most']:9.2f}" if line["most"] else f"{'':9}"
        print(f"{name:22}{line['planned']:9.2f}{most}{line['measured']:10.2f}{off:+8.0%}", flush=True)
    if out:
        out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _measure(script: str, checkpoint_dir: Path, data_dir: Path, flags: list[str]) -> dict[str, float]:
    """GB that are planned, that a kept heap may take, and that the run held."""
    with tempfile.TemporaryDirectory() as folder:
        words: list[str | Path] = [
            sys.executable,
            f"finetune/{script}.py",
            "--checkpoint_dir",
            checkpoint_dir,
            "--data_dir",
            data_dir,
        ]
        words += ["--out_dir", Path(folder) / "out", *flags]
        planned = run([*words, "--plan"], Path(folder) / "plan.log").stdout
        done = run(words, Path(folder) / "run.log")
    peak, most = re.search(rf"^ *peak +{_SIZE}", planned, re.M), re.search(rf"^ *at most +{_SIZE}", planned, re.M)
    assert peak, planned
    return {
        "planned": float(peak[1]),
        "most": float(most[1]) if most else 0.0,
        "measured": done.peak_rss / 1e9,
    }


if __name__ == "__main__":
    CLI(main)
