"""TRL's own preparation of prompts and answers, for benchmarks/prepare.py, in TRL's environment.

python benchmarks/prepare_trl.py rows.jsonl TOKENIZER_FOLDER OUT: rows of `prompt` and `completion`, masked prompts.
"""

import json
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any


def main(file: str, tokenizer_path: str, folder: str) -> None:
    """Load, prepare as SFTTrainer does before training, split, save; prints seconds and memory as JSON."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_path)
    config = SFTConfig(output_dir=folder, bf16=False, use_cpu=True, completion_only_loss=True, report_to=[])
    # The method needs these of a trainer, and a trainer a model.
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, busy = time.perf_counter(), time.process_time()
    raw = datasets.load_dataset("json", data_files=file, split="train", cache_dir=f"{folder}/cache")
    made: Any = SFTTrainer._prepare_dataset(trainer, raw, tokenizer, config, False, None, "train")
    assert {"input_ids", "labels"} <= set(made.column_names), made.column_names
    made.train_test_split(0.05, seed=42).save_to_disk(f"{folder}/made")
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": busy, "peak_rss": peak, "peak_rss_before": before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
