"""The memory that a model needs to generate, and where its layers go if there is too little.

Memory is known from config.json alone, before a weight is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from rich import box
from rich.table import Table

from lit_llama.device import (
    Precision,
    describe,
    parse_memory,
    peak_memory,
    pick_device,
    pick_dtype,
    resident_memory,
    total_memory,
)
from lit_llama.errors import ResourceError
from lit_llama.memory import amount, amounts
from lit_llama.model.config import Held, KVCacheType, LLaMAConfig, Quantization
from lit_llama.model.kernels.decode import PackedCache, packs
from lit_llama.model.kernels.packing import Weights
from lit_llama.model.kernels.paged import BLOCK, PagedCache
from lit_llama.model.llama import LLaMA
from lit_llama.model.quantize import is_quantized
from lit_llama.progress import stderr, stdout
from lit_llama.wording import param

BITS = {"nf4": 4.5, "nf4-dq": 4.13, "int8": 8.25, "int4": 4.5, "fp8": 8.0}
"""Bits of a weight of the linear layers with its share of the scales."""
PACKED: tuple[Held, ...] = ("stored", "int8", "int4")
"""Those that the kernels of a CPU compute with."""
CACHE_TOKENS = 256
"""Tokens for each of the answers that are made together, where there is memory; any of them may take more."""
LEAST_CACHE = 2048
"""Tokens that a model is to have a cache for, or as many as it reads."""
STEP_TOKENS = 512
"""Tokens of a step that a plan counts with, as in `EngineConfig`."""
COMFORT = 0.95
"""Share of the memory that a plan may fill."""
_CUDA_BYTES = 500 * 10**6  # of a context and its libraries, an assumption


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """A model on a device, what it needs, and what there is.

    Args:
        config: Shape of the model.
        device: Where it computes.
        dtype: Of activations, keys and values, and of weights as they are stored.
        held: How the linear layers are held.
        packs: Whether the kernels of a CPU can be had.
        max_sequences: Answers made together, at most.
        total: Bytes that the process may take.
        program: Those that Python and torch take of them.
        kv_cache: How keys and values are held.
        offloaded: Layers that are brought from elsewhere at each use, the last ones; on a CPU all or none, as they are
            mapped then, and the system keeps in memory what it can.
    """

    config: LLaMAConfig
    device: torch.device
    dtype: torch.dtype
    held: Held
    packs: bool
    max_sequences: int
    total: int
    program: int
    kv_cache: KVCacheType = "auto"
    offloaded: int = 0

    @property
    def packed(self) -> bool:
        """Whether the weights are packed for the instructions of a CPU."""
        return self.packs and self.held in PACKED and not self.offloaded

    @property
    def weights_kind(self) -> Weights:
        """Form in which the matrices of packed weights are held."""
        assert self.held in ("stored", "int8", "int4"), self.held
        return self.held

    @property
    def quantization(self) -> Quantization | None:
        """Quantisation of linear layers as they are loaded, and not as they are packed."""
        return None if self.packed or self.held == "stored" or self.held == "int4" else self.held

    @cached_property
    def _counts(self) -> tuple[int, int, int]:
        """Values of the linear layers of all decoder layers, of the rest of these, and of all that is in no layer."""
        config = self.config
        layers = config.num_hidden_layers
        alike = len({(config.sparse(index), config.recurrent(index)) for index in range(layers)}) == 1
        with torch.device("meta"):
            model = LLaMA(config.shortened(1) if alike else config)
        counts = {"linear": 0, "other": 0, "outside": 0}
        for name, parameter in model.named_parameters():  # a head that is the embedding comes once
            inside = "other" if name.startswith("model.layers.") else "outside"
            counts["linear" if is_quantized(name) else inside] += parameter.numel()
        times = layers if alike else 1
        return times * counts["linear"], times * counts["other"], counts["outside"]

    @property
    def layer(self) -> int:
        """Bytes of a decoder layer, in the mean."""
        return -(-self._layers // self.config.num_hidden_layers)

    @property
    def _layers(self) -> int:
        """Bytes of all decoder layers."""
        linear, other, _ = self._counts
        return int(linear * BITS.get(self.held, 8 * self.dtype.itemsize) / 8) + other * self.dtype.itemsize

    @property
    def outside(self) -> int:
        """Bytes of embedding, head and norm."""
        matrix, size = self.config.vocab_size * self.config.hidden_size, self._counts[2]
        if self.packed and self.held != "stored":  # the head is packed in 8 bits, beside the embedding
            untied = size >= 2 * matrix
            return (size - matrix * untied) * self.dtype.itemsize + int(matrix * BITS["int8"] / 8)
        return size * self.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of the weights that stay on the device."""
        layers = self.config.num_hidden_layers
        return self.outside + self._layers * (layers - self.offloaded) // layers

    @property
    def step(self) -> int:
        """Bytes that come and go with a step: activations, logits, and layers that are brought."""
        return step_bytes(self.config, self.max_sequences) + (2 * self.layer if self.offloaded else 0)

    @property
    def states(self) -> int:
        """Bytes of the states of recurrent layers, one for each answer."""
        return self.max_sequences * PagedCache.bytes_of_slot(self.config, self.dtype)

    @property
    def least(self) -> int:
        """Bytes with the smallest cache that is of use."""
        fixed = self.program + self.weights + self.step + self.states
        return fixed + _cache(self.config, self.dtype, LEAST_CACHE, self.kv_cache)

    @property
    def cache(self) -> int:
        """Bytes that the cache may take: for one answer as long as the model reads and for all that are made together,
        but no more than half of what the rest leaves. On a CPU they are only taken as they are used."""
        wanted = _wanted_cache(self.config, self.dtype, self.max_sequences, self.kv_cache)
        return max(0, min(wanted, (self.total - self.program - self.weights - self.step - self.states) // 2))

    @property
    def fits(self) -> bool:
        """Whether there is memory enough, with what is brought from elsewhere."""
        return self.least <= COMFORT * self.total


def step_bytes(config: LLaMAConfig, sequences: int) -> int:
    """Return the bytes of the activations of a step, and of the logits of so many sequences."""
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width = max(map(config.mlp_width, range(config.num_hidden_layers)))
    activations = STEP_TOKENS * (4 * config.hidden_size + heads + 2 * width) * 4
    return activations + 3 * sequences * config.vocab_size * 4


def _cache(config: LLaMAConfig, dtype: torch.dtype, tokens: int, kv_cache: KVCacheType) -> int:
    return (-(-tokens // BLOCK) + 1) * PackedCache.bytes_of_block(config, dtype, kv_cache)


def _wanted_cache(config: LLaMAConfig, dtype: torch.dtype, max_sequences: int, kv_cache: KVCacheType) -> int:
    return _cache(config, dtype, max(config.context_length, CACHE_TOKENS * max_sequences), kv_cache)


def cache_limit(
    config: LLaMAConfig, dtype: torch.dtype, device: torch.device, max_sequences: int, kv_cache: KVCacheType = "auto"
) -> int:
    """Return the most memory of a cache beside weights that are there already, see `GenerationPlan.cache`."""
    free = total_memory(device) - (resident_memory() if device.type == "cpu" else 0)
    free -= max_sequences * PagedCache.bytes_of_slot(config, dtype)
    return min(_wanted_cache(config, dtype, max_sequences, kv_cache), free // 2)


def plan_generation(
    config: LLaMAConfig,
    *,
    precision: Precision = "auto",
    held: Held = "stored",
    as_trained: bool = False,
    max_sequences: int = 32,
    kv_cache: KVCacheType = "auto",
    memory: str | None = None,
) -> GenerationPlan:
    """Plan a model on this machine, or on one like it with another memory.

    Args:
        config: Shape of the model.
        precision: Of weights and activations.
        held: How its linear layers are held.
        as_trained: They are held like this because the adapter was trained so: with the very same numbers.
        max_sequences: Answers made together, at most.
        kv_cache: How keys and values are held.
        memory: In place of what there is here, such as 16GB.

    Raises:
        UserError: `memory` is no amount.
        ResourceError: The quantisation cannot be had here.
    """
    device = pick_device()
    dtype = pick_dtype(precision, device)
    on_cpu = device.type == "cpu"
    plan = GenerationPlan(
        config=config,
        device=device,
        dtype=dtype,
        held=held,
        packs=on_cpu and packs(config, dtype) and not (as_trained and held == "int8"),
        max_sequences=max_sequences,
        total=total_memory(device) if memory is None else parse_memory(memory),
        program=resident_memory() if on_cpu else _CUDA_BYTES,
        kv_cache=kv_cache,
    )
    if held == "int4" and on_cpu and (beyond := config.beyond_llama):
        raise ResourceError(f"int4 is for packed kernels, which know no {beyond}; nf4 takes as little memory")
    if held == "int4" and not plan.packs:
        raise ResourceError(
            f"int4 is for CPUs and a C++ compiler, but this is {describe(device)}{'' if on_cpu else ', a GPU'}; nf4 "
            "takes as little memory" + (", or install g++" if on_cpu else "")
        )
    if plan.fits or held != "stored":
        return plan
    layers = config.num_hidden_layers
    fewer = (replace(plan, offloaded=count) for count in ([layers] if on_cpu else range(1, layers + 1)))
    return next((other for other in fewer if other.fits), plan)


def lighter(plan: GenerationPlan) -> Iterator[GenerationPlan]:
    """Yield ways to hold the model with which it fits as a whole, the most exact first."""
    kinds: tuple[Held, ...] = ("int8", "int4") if plan.packs else ("int8", "nf4")
    for held in kinds:
        other = replace(plan, held=held, offloaded=0)
        if other.weights < replace(plan, offloaded=0).weights and other.fits:
            yield other


def remedy(plan: GenerationPlan) -> str:
    """Advise where a model does not fit, or only with layers elsewhere."""
    ways = [f"{param('quantize', other.held)} ({amount(other.least)})" for other in lighter(plan)]
    return f"it fits with {', or '.join(ways)}" if ways else "take a smaller model, or a machine with more memory"


def numbers(plan: GenerationPlan) -> str:
    """Return the kinds of numbers of weights and activations."""
    dtype = str(plan.dtype).removeprefix("torch.")
    kinds = dtype if plan.held == "stored" else f"{plan.held} and {dtype}"
    return kinds if plan.kv_cache == "auto" else f"{kinds}, keys and values in {plan.kv_cache}"


def shortfall(plan: GenerationPlan) -> str:
    """Return the numbers that decide, against each other."""
    whole = replace(plan, offloaded=0)
    needed, there = amounts(whole.least, plan.total)
    return f"the model needs {needed}, there are {there} on the {plan.device.type}"


def offloading(plan: GenerationPlan) -> str:
    """Describe where the layers are that are not on the device."""
    size = amount(plan.layer * plan.offloaded)
    if plan.device.type == "cpu":
        return f"its {plan.offloaded} layers ({size}) are read from the disk at each step, which is slow"
    return f"{plan.offloaded} of its {plan.config.num_hidden_layers} layers ({size}) come from the CPU's memory"


def table(plan: GenerationPlan, name: str = "") -> Table:
    """Build the table of a plan, of a model of some name."""
    how = "packed for this CPU" if plan.packed else "as torch has them"
    if plan.device.type == "cpu" and (beyond := plan.config.beyond_llama):
        how += f", as the packed kernels know no {beyond}"
    found = Table(
        title=f"Plan{name and f' of {name}'}: {plan.config.num_hidden_layers} layers in {numbers(plan)}",
        box=box.SIMPLE_HEAD,
    )
    found.title_justify = "left"
    found.add_column("memory")
    found.add_column("GB", justify="right")
    found.add_column("what it is")
    on_cpu = plan.device.type == "cpu"
    found.add_row("program", _gb(plan.program), "python and torch" if on_cpu else "CUDA context (assumed)")
    found.add_row("weights", _gb(plan.weights), how if not plan.offloaded else offloading(plan))
    found.add_row("step", _gb(plan.step), f"activations and logits, {plan.max_sequences} answers at once")
    tokens = plan.cache // (PackedCache.bytes_of_block(plan.config, plan.dtype, plan.kv_cache) // BLOCK)
    found.add_row("cache", _gb(plan.cache), f"at most, {tokens:,} tokens; half of what is left")
    if plan.states:
        found.add_row("states", _gb(plan.states), "of recurrent layers: prompts are not shared, nor tokens guessed")
    found.add_section()
    peak = plan.program + plan.weights + plan.step + plan.cache + plan.states
    found.add_row("peak", _gb(peak), f"of {_gb(plan.total)} on the {plan.device.type}")
    return found


def print_plan(plan: GenerationPlan, name: str = "") -> None:
    """Print a plan on stdout, of a model of some name.

    Raises:
        ResourceError: The model does not fit.
    """
    console = stdout()
    if not console.is_terminal:  # a file has no edge
        console.width = 160
    console.print(table(plan, name), soft_wrap=False)
    if not plan.fits:
        raise ResourceError(f"{shortfall(plan)}; {remedy(plan)}")
    if plan.offloaded:
        stderr().print(f"{shortfall(plan)}; {offloading(plan)}; {remedy(plan)}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def report(tokens: int, seconds: float, device: torch.device, ending: str = "") -> None:
    """Report speed and peak memory on stderr.

    Args:
        tokens: That were made.
        seconds: That it took.
        device: Where.
        ending: How the answer ended, where that should be said.
    """
    stderr().print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s; "
        f"peak memory {amount(peak_memory(device))}{ending}"
    )
