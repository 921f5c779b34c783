"""GPUs that are not here, for which a run is planned: their memory, and what they compute. Imports no torch."""

import difflib
import re
from dataclasses import dataclass

from lit_llama.errors import ResourceError, UserError
from lit_llama.wording import param

BFLOAT16, FLOAT8 = (8, 0), (8, 9)
"""Compute capabilities from which on a GPU multiplies such numbers."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Args:
        name: As it is named by a flag.
        capability: Compute capability, which says what it computes.
        gigabytes: Sizes of memory that it is made with, the smallest first; none where only the capability is known.
    """

    name: str
    capability: tuple[int, int]
    gigabytes: tuple[int, ...] = ()

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16."""
        return self.capability >= BFLOAT16

    def memory(self, asked: str | None) -> str:
        """Return the memory to plan for, such as 16GB: what is asked for, else the smallest that it is made with.

        Raises:
            UserError: Nobody says.
        """
        if asked is not None:
            return asked
        if not self.gigabytes:
            raise UserError(
                f"says nothing of its memory: add {param('plan_memory')}, such as 16GB",
                parameter="plan_device",
                value=self.name,
            )
        return f"{self.gigabytes[0]}GB"

    def check(self, precision: str, quantize: str | None) -> None:
        """Refuse numbers that it does not compute with.

        Raises:
            ResourceError: It has no bfloat16, or no 8-bit floats.
        """
        if precision.startswith("bf16") and not self.bfloat16:
            raise ResourceError(
                f"{param('precision', precision)}: {self.name} has no bfloat16; use {param('precision', '16-mixed')} "
                "or 32-true"
            )
        if quantize == "fp8" and self.capability < FLOAT8:
            raise ResourceError(
                f"{param('quantize', 'fp8')}: {self.name} does not multiply 8-bit floats; use int8 or nf4, or leave "
                f"{param('quantize')} out"
            )

    def describe(self, asked: str | None) -> str:
        """Describe what is planned for, and what else there is where nobody asked for a size of memory."""
        others = " and ".join(map(str, self.gigabytes[1:])) if asked is None else ""
        more = f"; {param('plan_memory')} for those with {others} GB" if others else ""
        return f"{self.memory(asked)} on a {self.name}, {'with' if self.bfloat16 else 'without'} bfloat16{more}"


CARDS = {
    card.name: card
    for card in (
        Card("p100", (6, 0), (12, 16)),
        Card("v100", (7, 0), (16, 32)),
        Card("t4", (7, 5), (16,)),
        Card("rtx2080ti", (7, 5), (11,)),
        Card("a100", (8, 0), (40, 80)),
        Card("a10", (8, 6), (24,)),
        Card("a40", (8, 6), (48,)),
        Card("a6000", (8, 6), (48,)),
        Card("rtx3060", (8, 6), (8, 12)),
        Card("rtx3090", (8, 6), (24,)),
        Card("l4", (8, 9), (24,)),
        Card("l40s", (8, 9), (48,)),
        Card("rtx4090", (8, 9), (24,)),
        Card("h100", (9, 0), (80,)),
        Card("h200", (9, 0), (141,)),
        Card("b200", (10, 0), (180,)),
        Card("rtx5090", (12, 0), (32,)),
    )
}


def find_card(text: str) -> Card:
    """Find a GPU by its name, however that is written, or by its compute capability, as in sm_75.

    Raises:
        UserError: It is neither.
    """
    word = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())
    if found := re.fullmatch(r"sm(\d+)(\d)", word):
        return Card(text, (int(found[1]), int(found[2])))
    if word in CARDS:
        return CARDS[word]
    close = difflib.get_close_matches(word, CARDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(CARDS)}."
    raise UserError(
        f"{param('plan_device')} is {text!r}, which is no GPU that is known here; {hint} Any other is named by its "
        "compute "
        f"capability, such as sm_75, with {param('plan_memory')}"
    )
