"""Loss of adapters, or of whole models, on the rows held out, in float32, by transformers and PEFT for everybody alike.

For pairs of answers it is the loss of DPO with a beta of 0.1; that of the base against itself is log 2.

python -m benchmarks.training.held_out CHECKPOINT_DIR ROWS.npz ADAPTER_DIR [ADAPTER_DIR ...]

prints a JSON array: the base's loss, then one for each adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training.rows import IGNORE_INDEX, load_rows

BETA = 0.1


def main() -> None:
    """Evaluate the base and the adapters named on the command line."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint_dir, rows_file, *adapters = sys.argv[1:]
    rows = load_rows(rows_file).held_out
    losses = []
    reference: Any = None
    for adapter in ("", *adapters):
        peft = bool(adapter) and (Path(adapter) / "adapter_config.json").exists()
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint_dir if peft or not adapter else adapter, dtype=torch.float32
        )
        if peft:
            model = PeftModel.from_pretrained(model, adapter)
        if len(rows[0]) == 2:
            losses.append(_loss(model.eval(), rows))
        else:
            leads = _leads(model.eval(), rows)
            reference = leads if reference is None else reference
            losses.append(-torch.nn.functional.logsigmoid(BETA * (leads - reference)).mean().item())
    print(json.dumps(losses))


@torch.no_grad()
def _loss(model: Any, rows: Any) -> float:
    """Sum over the trained tokens divided by their number, row by row, so that nothing is padded."""
    total, count = 0.0, 0
    for ids, labels in rows:
        targets = torch.from_numpy(labels[1:]).long()
        logits = model(torch.from_numpy(ids[None]).long()).logits[0, :-1]  # (T - 1, V)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        total += loss.item()
        count += int((targets != IGNORE_INDEX).sum())
    return total / count


@torch.no_grad()
def _leads(model: Any, rows: Any) -> torch.Tensor:
    """log p of the chosen answer less that of the rejected one, of each row, in float64."""
    leads = []
    for prompt, *answers in rows:
        found = []
        for answer in answers:
            ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]  # (tokens of the answer, V)
            found.append(logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).double().sum())
        leads.append(found[0] - found[1])
    return torch.stack(leads)


if __name__ == "__main__":
    main()
