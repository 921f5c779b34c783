"""Learning rate `auto`: a published rule of the model's width and the adapter's scale."""

import math
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.train.config import TrainConfig
from lit_llama.train.methods.method import LoRA, Method, Preference
from lit_llama.train.state import SETTING, read_record
from lit_llama.wording import param

BASE, WIDTH = 5e-5, 2000
EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
"""By model_type: how fast the rate falls with the width."""
FOR_LORA, FOR_SHORT_LORA, SHORT = 10, 15, 100
"""By what a rate for adapters is higher than one for all weights: in general, and in runs of fewer than SHORT steps."""
ALPHA = 32
"""Of the adapters that the rule was found with, whose update is scaled by alpha / r."""
BOUNDS = {"lora": (2e-5, 5e-3), "full": (2e-6, 5e-4)}
"""What the rule may come to: further away from the models it was found with, nobody has measured it."""


def rule(config: LLaMAConfig, steps: int, lora: LoRAConfig | None) -> tuple[float, str]:
    """Compute the learning rate that suits a model: 5e-5 x M x (2000 / hidden_size)^P, to two digits.

    Found by Thinking Machines on 14 Llama and Qwen models with AdamW on instruction data (Schulman et al. 2025, "LoRA
    Without Regret", thinkingmachines.ai/blog/lora, and the hyperparameters of their Tinker cookbook). M is 1 for all
    weights, 10 for adapters, and about 15 in runs of less than a hundred steps. P is 0.781 for Llama and 0.0775 for
    Qwen; another family takes the P with the lower rate. The cookbook's later sweep over these families, in steps of
    about three, found rates of 0.6 to 2.8 times this one, most of them higher. Widths below 2048 are extrapolated.

    The rate hardly depends on the rank where an update is scaled by alpha / r with alpha 32, as it was in theirs. With
    AdamW every value of B moves by the learning rate at first, so that the update grows with alpha x rate: for another
    alpha the rate is taken times 32 / alpha. Scaled by alpha / sqrt(r) an update is as with alpha sqrt(r) above. With
    LoRA+ it is B's rate that the rule says.

    Args:
        config: Shape of the base.
        steps: Optimizer steps of the run.
        lora: Shape of the adapter; None where all weights train.

    Returns:
        The rate, within BOUNDS; and how it came about, for people.
    """
    powers = {found: (WIDTH / config.hidden_size) ** found for found in set(EXPONENTS.values())}
    exponent = EXPONENTS.get(config.model_type, min(powers, key=powers.__getitem__))
    factor = 1 if lora is None else FOR_SHORT_LORA if steps < SHORT else FOR_LORA
    rate, why = BASE * factor * powers[exponent], f"{BASE * factor:.3g} x ({WIDTH} / {config.hidden_size})^{exponent}"
    if config.model_type not in EXPONENTS:
        why += f", as for Llama and Qwen, since nobody has measured it for {config.model_type}"
    if lora is not None:
        alpha = lora.alpha * math.sqrt(lora.r) if lora.use_rslora else lora.alpha
        if alpha != ALPHA:
            rate, why = rate * ALPHA / alpha, f"{why} x {ALPHA} / alpha {alpha:.4g}"
        if lora.loraplus_lr_ratio != 1:
            rate, why = rate / lora.loraplus_lr_ratio, f"{why} / loraplus_lr_ratio {lora.loraplus_lr_ratio:g}"
    low, high = BOUNDS["full" if lora is None else "lora"]
    if not low <= rate <= high:
        why += f" = {rate:.1e}, kept within {low:g} and {high:g}"
    return float(f"{min(max(rate, low), high):.1e}"), why


def shape_of(method: Method) -> LoRAConfig | None:
    """Return the shape of the adapter that a method trains, if it does."""
    return method.config if isinstance(method, LoRA) else None


def why_none(method: Method, train: TrainConfig) -> str:
    """Say why the rule does not hold for a run; "" where it does."""
    if isinstance(method, Preference):
        return "there is no published rule for preference training, whose rates are a tenth and less"
    if isinstance(method, LoRA) and method.config.saved:
        return f"the rule is for adapters, and {param('lora.modules_to_save')} trains whole matrices at their rate"
    if train.optimizer == "sgd":
        return "the rule is for Adam"
    return ""


def check_auto(method: Method, train: TrainConfig) -> None:
    """Refuse `auto` where the rule does not hold.

    Raises:
        UserError: It does not.
    """
    if train.learning_rate == "auto" and (reason := why_none(method, train)):
        usual = ", such as the default of 2e-5" if isinstance(method, Preference) else ""
        raise UserError(f"is auto, but {reason}", parameter="train.learning_rate", remedy=f"name a rate{usual}")


def resolved(
    method: Method, train: TrainConfig, config: LLaMAConfig, rows: int, state: Path | None = None
) -> tuple[TrainConfig, list[str]]:
    """Put a number in the place of `auto`.

    Args:
        method: What trains.
        train: Course of the training, fitted to the data.
        config: Shape of the base.
        rows: Samples of the training split.
        state: Where the run goes on from: it keeps the rate that it began with, however long it is to be.

    Returns:
        The course with a number; and the line that says it, if there was `auto`.

    Raises:
        UserError: The rule does not hold for such a run.
    """
    if train.learning_rate != "auto":
        return train, []
    check_auto(method, train)
    begun = read_record(state)["identity"].get(f"{SETTING}train.learning_rate") if state else None
    if isinstance(begun, float):
        rate, why = begun, "as the run began"
    else:
        rate, why = rule(config, train.steps(rows), shape_of(method))
    return replace(train, learning_rate=rate), [f"learning rate {rate:.1e}: auto, {why}"]
