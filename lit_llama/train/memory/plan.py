"""Plan of a run: what it will need and whether it fits, out of config.json and the lengths of the data alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from lit_llama.device import (
    Numerics,
    gpu_numerics,
    numerics,
    parse_memory,
    pick_device,
    total_memory,
)
from lit_llama.generate.plan import step_bytes
from lit_llama.model.config import Checkpointing, LLaMAConfig, Quantization
from lit_llama.model.kernels.decode import packs
from lit_llama.model.kernels.paged import PagedCache
from lit_llama.text.dataset.batches import Rows, largest_group
from lit_llama.train.config import RunConfig, TrainConfig
from lit_llama.train.distributed.processes import ALONE, Processes
from lit_llama.train.logs.sampler import MAX_NEW_TOKENS, cache_blocks
from lit_llama.train.loss import CHUNK
from lit_llama.train.memory.footprint import Build, Shape, Sizes
from lit_llama.train.memory.program import program_memory
from lit_llama.train.methods.method import Method
from lit_llama.train.optim import state_bytes

CUDA_BYTES = 500 * 10**6
"""What a CUDA context and its libraries take; an assumption, as it differs from GPU to GPU."""
FETCHED = 2
"""Layers that are spread and whole at once: one computes while the next is fetched."""
REDUCED = 2
"""Times that the gradients of a layer that is spread are there whole: as they were computed, and as they are sent."""
LEAST_TOKENS = 512
"""Per forward pass, where a plan may choose."""
COMFORT = 0.92
"""Share of the memory that a plan may fill to be sure that it fits."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that there is.

    Args:
        total: Bytes that the run may take.
        program: Those that Python and torch take of them before any tensor is there.
    """

    total: int
    program: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, what it needs, and what there is.

    Args:
        config: Shape of the base.
        splits: The data.
        method: What trains.
        train: Course of the training.
        numerics: Where and in which numbers.
        quantize: How the base's linear layers are stored, if not in the dtype of `numerics`.
        seed: Of the order of the samples.
        memory: What there is for each process.
        processes: Those that share the work. All bytes are those of one of them.
    """

    config: LLaMAConfig
    splits: Mapping[str, Rows]
    method: Method
    train: TrainConfig
    numerics: Numerics
    quantize: Quantization | None
    seed: int
    memory: Memory
    processes: Processes = ALONE
    _passes: dict[object, int] = field(default_factory=dict, compare=False, repr=False)
    _sizes: dict[object, Sizes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.train.steps(len(self.splits["train"]))

    @property
    def tokens_at_once(self) -> int:
        """Most tokens per forward pass."""
        return self.train.tokens_on(self.numerics.device.type)

    @cached_property
    def largest(self) -> Shape:
        """The largest micro-batch that the steps of this run meet."""
        return self._shape("train", self.train.batch_size, self.steps)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to test on."""
        return len(self.splits["test"]) > 0

    @cached_property
    def largest_test(self) -> Shape:
        """Shape of an evaluation, which takes the whole test split at once."""
        return self._shape("test", len(self.splits["test"]), 1)

    @cached_property
    def laid(self) -> Mapping[str, Rows]:
        """The data as the batches of this run count it."""
        return {name: split.counted(self._shares(name)) for name, split in self.splits.items()}

    def _shares(self, name: str) -> bool:
        """Whether what samples of a split begin with is computed once: dropout draws for each of them."""
        return self.build.shares if name == "train" else self.build.evaluation_shares

    @cached_property
    def largest_referred(self) -> Shape:
        """The largest micro-batch of a pass over the whole training split, as for a reference."""
        return self._shape("train", len(self.splits["train"]), 1)

    def _shape(self, name: str, batch_size: int, steps: int) -> Shape:
        split, tokens = self.laid[name], self.tokens_at_once
        rows = largest_group(
            split.lengths,
            batch_size=batch_size,
            micro_batch_tokens=tokens,
            seed=self.seed,
            steps=steps,
            shares=self.processes.size,
        )
        batch = split.batch(rows, share=self._shares(name))
        return Shape(batch.lengths, len(batch.targets), batch.parents)

    @cached_property
    def build(self) -> Build:
        """The model as this run has it."""
        return Build(
            config=self.config,
            method=self.method,
            numerics=self.numerics,
            checkpointing=self.train.activation_checkpointing,
            quantize=self.quantize,
            noise=self.train.neftune_noise_alpha,
            spread=self.processes.sharded,
        )

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of the base, and how many values are trained, found once as a pass is."""
        key = (self.quantize, self.processes.sharded)
        if key not in self._sizes:
            self._sizes[key] = self.build.sizes()
        return self._sizes[key]

    @property
    def kept(self) -> dict[str, int]:
        """Bytes that are there from the first step to the last."""
        sizes, copies = self.sizes, 2 if self.train.keep == "best" else 1
        shares = self.processes.size if self.spreads_all else 1
        trained, values = -(-sizes.trained_bytes // shares), -(-sizes.trained // shares)
        return {
            "weights": sizes.base - (0 if self.spreads_all else self._elsewhere),
            "trained": trained * copies,
            "gradients": trained,
            "optimizer": state_bytes(self.train.optimizer, values, trained),
        }

    @property
    def spreads_all(self) -> bool:
        """Whether what trains is spread over the processes, too: gradients and optimizer with it."""
        return self.processes.sharded and self.method.whole

    @property
    def saved(self) -> int:
        """Bytes of a state, which holds all of what trains."""
        parts = self.kept["trained"] + self.kept["optimizer"]
        return parts * self.processes.size if self.spreads_all else parts

    @property
    def _elsewhere(self) -> int:
        """Bytes of the base that other processes hold."""
        size = self.processes.size
        spread = self.sizes.trained_bytes if self.spreads_all else self.sizes.layers
        return spread * (size - 1) // size if self.processes.sharded else 0

    @cached_property
    def passing(self) -> dict[str, int]:
        """Bytes that come and go, never two of them at once."""
        on_cpu = self.numerics.device.type == "cpu"
        referred = (
            {"reference": self._pass("reference", self.largest_referred, self.build.evaluation_peak)}
            if self.method.refers
            else {}
        )
        return referred | {
            "training": self._fetching(self._pass("training", self.largest, self.build.training_peak), train=True),
            "evaluation": self._fetching(self._pass("evaluation", self.largest_test, self.build.evaluation_peak))
            if self.evaluates
            else 0,
            "answers": self._answers + self.packs_answers * self._packed if on_cpu else 0,
            # A file is written out of the tensors as they are; but the copy of an adapter has PEFT's names and shapes.
            "saving": (0 if self.method.whole else self.sizes.trained_bytes) + self.sizes.largest if on_cpu else 0,
        }

    @cached_property
    def packs_answers(self) -> bool:
        """Whether the sample prompts are answered with a packed copy of the model: where half of the memory stays free.

        It is in the numbers of the weights; where products have others, or weights fewer bits, it would answer as
        another model.
        """
        numbers = self.numerics
        return (
            self._answers > 0
            and numbers.device.type == "cpu"
            and numbers.product is None
            and numbers.linear == numbers.rest
            and self.quantize is None
            and packs(self.config, numbers.rest)
            and self.resting + self._answers + self._packed <= self.memory.total // 2
        )

    @property
    def _packed(self) -> int:
        """Bytes of a packed copy of the model."""
        return self.sizes.plain + self.sizes.trained_bytes

    def _fetching(self, peak: int, *, train: bool = False) -> int:
        """Bytes of a pass with this peak beside the parameters, and what of these it has whole meanwhile."""
        if not self.processes.sharded:
            return peak
        layer, (head, embedding) = self.sizes.layers // self.config.num_hidden_layers, self.sizes.head
        peak += FETCHED * layer
        if not self.spreads_all:
            return peak
        if not train:
            return max(peak, embedding) + head
        # When the layers are done, head and embedding remain: themselves, and what is summed of them.
        return max(peak + REDUCED * layer + 2 * head, (1 + REDUCED) * (head + embedding))

    @property
    def _answers(self) -> int:
        """Bytes of the engine that answers the sample prompts on a CPU: its cache and the activations of a step."""
        count = min(self.train.sample_prompts, len(self.splits["test"]))
        if not count or self.processes.sharded:
            return 0
        longest = min(self.splits["test"].longest + MAX_NEW_TOKENS, self.config.context_length)
        blocks = cache_blocks([longest] * count, self.tokens_at_once)
        cache = blocks * PagedCache.bytes_of_block(self.config, self.numerics.rest)
        return cache + step_bytes(self.config, count)

    def _pass(self, name: str, shape: Shape, peak: Callable[[Shape], int]) -> int:
        """A peak, found once for all plans that were made out of each other."""
        mode = name == "training" and self.train.activation_checkpointing
        key = (name, mode, self.quantize, self.processes.sharded, *shape.lengths, shape.trained)
        if key not in self._passes:
            self._passes[key] = peak(shape)
        return self._passes[key]

    @property
    def resting(self) -> int:
        """Bytes between two steps."""
        return self.memory.program + sum(self.kept.values())

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.memory.program + self.loading, self.resting + max(self.passing.values()))

    @property
    def loading(self) -> int:
        """Bytes on a CPU when the last weight is read: the base, beside a matrix as it is stored and as it is put."""
        if self.numerics.device.type != "cpu":
            return 0
        frozen = self.sizes.trained_bytes if self.method.whole else self.sizes.base
        return frozen + 2 * self.sizes.largest

    @property
    def fits(self) -> bool:
        """Whether there is as much memory as is needed."""
        # What cannot rest need not be run, which takes longer to find out.
        return self.resting <= self.memory.total and self.peak <= self.memory.total

    @property
    def comfortable(self) -> bool:
        """Whether it fits for sure: plans are not exact."""
        return self.resting <= self.memory.total and self.peak <= COMFORT * self.memory.total

    @property
    def holes(self) -> int:
        """Bytes that a CPU's heap may take above the peak where it keeps what is freed for the next step: once more
        what comes and goes, and what other processes hold, as the base is read whole before it is spread."""
        return max(self.passing.values()) + self._elsewhere if self.numerics.device.type == "cpu" else 0

    @property
    def roomy(self) -> bool:
        """Whether there is memory for that; see device.keep_freed_memory."""
        return self.fits and self.peak + self.holes <= self.memory.total

    @property
    def merging(self) -> int:
        """Bytes that it takes to compare the merged model with base and adapter, one after the other; 0
        where nothing is to be merged."""
        return 0 if self.method.whole else self.sizes.plain + self.kept["trained"]

    @property
    def logits(self) -> int:
        """Bytes of the logits that are held at once, in the dtype of the products."""
        dtype = self.numerics.product or self.numerics.linear
        return min(CHUNK, self.largest.trained) * self.config.vocab_size * dtype.itemsize

    def changed(self, checkpointing: Checkpointing, micro_batch_tokens: int, quantize: Quantization | None) -> "Plan":
        """Plan the run with other settings."""
        train = replace(self.train, activation_checkpointing=checkpointing, micro_batch_tokens=micro_batch_tokens)
        return replace(self, train=train, quantize=quantize)

    def tokens(self) -> tuple[int, int]:
        """Count the tokens that the run goes through, and those that are trained, as far as steps take whole epochs."""
        split = self.laid["train"]
        passes = min(self.steps * self.train.batch_size / len(split), self.train.epochs)
        return round(passes * split.places()), round(passes * split.trained_tokens())


def make_plan(
    method: Method,
    run: RunConfig,
    config: LLaMAConfig,
    splits: Mapping[str, Rows],
    *,
    memory: str | None = None,
    processes: Processes = ALONE,
) -> Plan:
    """Plan a run.

    Args:
        method: What trains.
        run: Its settings.
        config: Shape of the base.
        splits: The data.
        memory: Of a GPU that is not here, such as 16GB; None plans for this machine.
        processes: Those that share the work.

    Raises:
        UserError: `memory` is no amount.
        ResourceError: This machine does not compute in the precision of the run.
    """
    if memory is None:
        device = pick_device()
        numbers = numerics(run.precision, device, whole=method.whole)
        on_cpu = device.type == "cpu"
        program = program_memory(method.whole, run.train, numbers, run.quantize) if on_cpu else CUDA_BYTES
        # Each process has a GPU to itself; of a CPU's memory those of one machine have a share each.
        shares = processes.here if device.type == "cpu" else 1
        there = Memory(total=total_memory(device) // shares, program=program)
    else:
        numbers = gpu_numerics(run.precision, whole=method.whole)
        there = Memory(total=parse_memory(memory), program=CUDA_BYTES)
    plan = Plan(
        config=config,
        splits=splits,
        method=method,
        train=run.train,
        numerics=numbers,
        quantize=run.quantize,
        seed=run.seed,
        memory=there,
        processes=processes,
    )
    return fitted(plan)


def fitted(plan: Plan) -> Plan:
    """Plan with a number of tokens per forward pass that the memory takes, where they are auto."""
    if plan.train.micro_batch_tokens != "auto":
        return plan
    tokens = plan.processes.first(lambda: _comfortable(plan))
    return plan.changed(plan.train.activation_checkpointing, tokens, plan.quantize)


def _comfortable(plan: Plan) -> int:
    """As many tokens per forward pass as suit the device, or as its memory takes; where it takes none, the former."""
    tokens = plan.tokens_at_once
    other, least = plan, max(LEAST_TOKENS, int(plan.laid["train"].lengths.max()))
    while other.resting <= plan.memory.total:
        if other.comfortable:
            return other.tokens_at_once
        if other.tokens_at_once <= least:
            break
        other = plan.changed(plan.train.activation_checkpointing, max(other.tokens_at_once // 2, least), plan.quantize)
    return tokens
