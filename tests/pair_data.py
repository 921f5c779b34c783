"""Preference data folders as prepare/ makes them, written here with `datasets`, and runs of seconds on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small_runs import LORA

from lit_llama.text.dataset.folder import META_FILE
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.train.config import PreferenceConfig, Resume, RunConfig, Strategy, TrainConfig
from lit_llama.train.methods.method import Preference
from lit_llama.train.run import finetune

Row = tuple[list[int], list[int], list[int]]
PAIRED = TrainConfig(
    epochs=2,
    batch_size=4,
    micro_batch_tokens=150,
    learning_rate=1e-2,
    eval_interval=3,
    save_interval=1,
    sample_prompts=0,
)


def pair_rows(count: int, seed: int = 0, *, vocab_size: int = 300) -> list[Row]:
    """Rows of drawn ids: prompts of 3 to 30 tokens, answers of 1 to 20."""
    import random

    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(low, high))]

    return [(ids(3, 30), ids(1, 20), ids(1, 20)) for _ in range(count)]


def single_answers(rows: Sequence[Row]) -> list[Row]:
    """The chosen answer alone of every other row, and the rejected one of those between."""
    return [
        (prompt, chosen, []) if number % 2 else (prompt, [], rejected)
        for number, (prompt, chosen, rejected) in enumerate(rows)
    ]


def write_pairs(folder: Path, tokenizer_dir: Path, train: Sequence[Row], test: Sequence[Row]) -> Path:
    """A preference data folder of rows."""
    import datasets

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in names})
    splits = {
        name: datasets.Dataset.from_dict(
            {column: [list(row[side]) for row in rows] for side, column in enumerate(names)}, features=features
        )
        for name, rows in (("train", train), ("test", test))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    tokenizer = Tokenizer.from_path(tokenizer_dir)
    meta: dict[str, Any] = {
        "format": 1,
        "kind": "preference",
        "pairs": all(chosen and rejected for _, chosen, rejected in (*train, *test)),
        "splits": {name: {"rows": len(rows)} for name, rows in (("train", train), ("test", test))},
        "tokenizer": {"path": str(tokenizer_dir), "fingerprint": tokenizer.fingerprint(), "size": tokenizer.size},
    }
    (folder / TEMPLATE_FILE).write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}", "utf-8")
    (folder / META_FILE).write_text(json.dumps(meta), "utf-8")
    return folder


def prefer(
    checkpoint: Path,
    data: Path,
    out: Path,
    train: TrainConfig = PAIRED,
    *,
    resume: Resume = "never",
    seed: int = 0,
    strategy: Strategy = "auto",
    **preference: Any,
) -> Path:
    """finetune as the door of DPO calls it."""
    config = RunConfig(
        checkpoint_dir=checkpoint,
        data_dir=data,
        out_dir=out,
        lora=LORA,
        dpo=PreferenceConfig(**preference),
        train=train,
        precision="32-true",
        seed=seed,
        resume=resume,
        strategy=strategy,
    )
    finetune(Preference(LORA, preference=config.dpo), config)
    return out
