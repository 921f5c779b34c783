"""Loading of folders to generate. Doors name it, so that nothing here imports torch before it is used."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lit_llama.device import Precision
from lit_llama.errors import UserError
from lit_llama.model.config import Held, KVCacheType
from lit_llama.text.dataset.config import StyleName


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Settings by which a checkpoint folder, or an adapter folder with its base, is loaded to generate.

    Args:
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        merge_adapter: Make an adapter part of the weights of its base as they are loaded, with the numbers that
            finetune/merge.py writes, in place of keeping it apart.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        kv_cache: Hold keys and values in the numbers of activations (auto), or in 8 bits (int8), which take half of the
            memory and a little of the accuracy.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        batch_size: Answers that are made together.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
        verify: Hash every file that is read, however large, before the work; small ones always are.
        packed: On a CPU, pack the weights for its instructions, which the model then has no more; False keeps
            `LLM.model`, as for a look into it.

    Raises:
        UserError: No answer is to be made, or keys and values are to be held in a way that is not known.
    """

    base_dir: Path | None = None
    merge_adapter: bool = False
    prompt_style: StyleName | None = None
    precision: Precision = "auto"
    quantize: Held | None = None
    kv_cache: KVCacheType = "auto"
    draft_dir: Path | None = None
    batch_size: int = 32
    plan: bool = False
    plan_memory: str | None = None
    verify: bool = False
    packed: bool = True

    def __post_init__(self) -> None:
        for name in ("base_dir", "draft_dir"):
            if (place := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(place))
        if self.kv_cache not in get_args(KVCacheType):
            raise UserError(f"--kv_cache is {self.kv_cache!r}, expected {' or '.join(get_args(KVCacheType))}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}, expected 1 or more")

    @property
    def only_planned(self) -> bool:
        """Whether nothing is to be loaded."""
        return self.plan or self.plan_memory is not None
