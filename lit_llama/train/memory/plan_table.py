"""The plan of a run as people read it: a table, one line, and what to do where the run does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import get_args

import torch
from rich import box
from rich.table import Table

from lit_llama.errors import ResourceError, UserError
from lit_llama.memory import amount, amounts, ran_out
from lit_llama.model.config import Checkpointing, LLaMAConfig, Quantization
from lit_llama.progress import stderr, stdout
from lit_llama.text.dataset.folder import read_meta
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.train.config import RunConfig
from lit_llama.train.distributed.launch import layout
from lit_llama.train.distributed.processes import Processes, described
from lit_llama.train.inputs import fitting, folder_kind, read_splits
from lit_llama.train.memory.cards import find_card
from lit_llama.train.memory.plan import Plan, fitted, make_plan
from lit_llama.train.methods.method import Method
from lit_llama.train.rate import resolved
from lit_llama.wording import call, param, params


def print_plan(method: Method, run: RunConfig) -> None:
    """Print the plan of a run on stdout.

    Raises:
        ResourceError: It does not fit.
        UserError: As `plan_run`.
    """
    plan, remarks = plan_run(method, run)
    console = stdout()
    if not console.is_terminal:  # a file has no edge
        console.width = 160
    console.print(table(plan), soft_wrap=False)
    for remark in remarks:
        stderr().print(remark)
    if not plan.fits:
        raise ResourceError(f"{does_not_fit(plan)}; {advice(plan)}")


def plan_run(method: Method, run: RunConfig) -> tuple[Plan, list[str]]:
    """Plan a run, with remarks on how it is fitted to its data; of the checkpoint only config.json is read.

    Args:
        method: What trains.
        run: Its settings; with those of a plan it is one for a GPU that is not here.

    Raises:
        UserError: Devices or a strategy that cannot be.
    """
    here, machines = layout(run.devices, run.num_nodes)
    memory = run.plan_memory
    if run.plan_device is not None:
        kind = find_card(run.plan_device)
        kind.check(run.precision, run.quantize)
        stderr().print(f"planned for {kind.describe(memory)}")
        memory = kind.memory(memory)
        run = replace(run, precision="16-mixed") if run.precision == "auto" and not kind.bfloat16 else run
    elif memory is not None and run.precision == "auto":
        stderr().print(f"planned for a GPU with bfloat16; {param('plan_device')} names another, such as v100 or t4")
    config = LLaMAConfig.from_folder(run.base)
    splits = read_splits(
        run.base, config, run.data_dir, read_meta(run.data_dir, kind=folder_kind(method.rows)), method.rows
    )
    tokenizer = None
    with suppress(UserError):  # config.json is enough; but where there is a tokenizer, the run will hold it
        tokenizer = Tokenizer.from_path(run.base)
    train, remarks = fitting(run.train, splits, run.data_dir)
    train, rate = resolved(method, train, config, len(splits["train"]))
    processes = Processes(size=here * machines, here=here)
    plan = make_plan(method, replace(run, train=train), config, splits, memory=memory, processes=processes)
    del tokenizer
    return spread(plan, run), [*remarks, *rate]


def table(plan: Plan) -> Table:
    """Build the table of a plan: what is needed, out of what there is, and what the run will go through."""
    device = plan.numerics.device.type
    title = f"Plan: {_settings(plan)}{described(plan.processes, whole=plan.method.whole)}"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    found.add_column("memory")
    found.add_column("GB", justify="right")
    found.add_column("what it is")
    kept, passing, largest = plan.kept, plan.passing, plan.largest
    kind = _name(plan.numerics.rest) if plan.method.whole else "float32"
    notes = {
        "program": "python, torch and what else the run loads"
        if device == "cpu"
        else "CUDA context and libraries (assumed)",
        "weights": f"frozen, {plan.quantize or _name(plan.numerics.linear)}",
        "trained": f"{plan.sizes.trained:,} values, {kind}",
        "gradients": kind,
        "optimizer": plan.train.optimizer,
        "reference": "of all rows, before the first step",
        "training": f"largest micro-batch: {sum(largest.lengths):,} tokens of {len(largest.lengths)} samples, "
        f"{largest.trained:,} trained; logits {_gb(plan.logits)} of it",
        "evaluation": f"largest: {sum(plan.largest_test.lengths):,} tokens"
        if plan.evaluates
        else "none: no test split",
        "answers": "the cache and a step of the sample prompts" + ", a packed copy of the model" * plan.packs_answers
        if passing["answers"]
        else "none",
        "saving": "a matrix, whole" if plan.spreads_all else "a matrix" if plan.method.whole else "the adapter",
    }
    for name, size in {"program": plan.memory.program, **kept, **passing}.items():
        found.add_row(name, _gb(size), notes[name] + (" (one of these at a time)" if name == "saving" else ""))
    found.add_section()
    what = ", as resident pages of the process (VmHWM)" if device == "cpu" else ""
    found.add_row("peak", _gb(plan.peak), f"of {_gb(plan.memory.total)} on the {device}{what}")
    if plan.roomy and plan.holes:
        found.add_row("at most", _gb(plan.peak + plan.holes), "as freed memory is kept for the next step, for speed")
    if plan.merging:
        found.add_row("merging", _gb(plan.merging), f"later, in {call('merge')}")
    found.add_section()
    found.add_row("run", "", course(plan))
    return found


def short(plan: Plan) -> str:
    """Describe the plan in one line."""
    kept = sum(plan.kept.values()) - plan.kept["weights"]
    room = (
        f" (up to {_gb(plan.peak + plan.holes)}, as freed memory is kept for speed)"
        if plan.roomy and plan.holes
        else ""
    )
    merging = f", merging later {_gb(plan.merging)}" if plan.merging else ""
    return (
        f"{_gb(plan.peak)} GB{room} of {_gb(plan.memory.total)} on the {plan.numerics.device.type}: "
        f"program {_gb(plan.memory.program)}, frozen weights {_gb(plan.kept['weights'])}, trained ones with gradients "
        f"and optimizer {_gb(kept)}, activations {_gb(plan.passing['training'])} "
        f"({sum(plan.largest.lengths):,} tokens; logits {_gb(plan.logits)} of it), "
        f"evaluation {_gb(plan.passing['evaluation'])}, answers {_gb(plan.passing['answers'])}, "
        f"saving {_gb(plan.passing['saving'])}{merging}"
        f"{described(plan.processes, whole=plan.method.whole)}"
    )


def does_not_fit(plan: Plan) -> str:
    """Describe the one number that decides, against what there is."""
    least = plan.resting > plan.memory.total
    needed, there = amounts(plan.resting if least else plan.peak, plan.memory.total)
    when = " before the first step" if least else ""
    return f"the run needs {needed}{when}, there are {there} on the {plan.numerics.device.type}"


def advice(plan: Plan) -> str:
    """Advise settings with which the run fits, found by planning with them, or what to do where none does."""
    found = list(islice((_change(plan, other) for other in smaller(plan) if other.comfortable), 3))
    if found:
        return f"it fits with {', or '.join(found)}"
    adapters = f", or {call('finetune', method='lora')}" if plan.method.whole else ""
    return f"no setting makes it fit; take a smaller base{adapters}"


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Explain memory that runs out inside by an error that shows the plan and three smaller settings.

    Raises:
        ResourceError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's has no class
        if not ran_out(error):
            raise
        found = ", or ".join(_change(plan, other) for other in lighter(plan)[:3])
        way_out = f"try {found}" if found else "take a smaller base, or a larger machine"
        raise ResourceError(f"out of memory; the plan was {short(plan)}; {way_out}") from error


def _change(plan: Plan, other: Plan) -> str:
    """What is to be set to come from one to the other, and what that needs."""
    changes: dict[str, object] = {}
    if other.tokens_at_once != plan.tokens_at_once:
        changes["train.micro_batch_tokens"] = other.tokens_at_once
    if other.train.activation_checkpointing != plan.train.activation_checkpointing:
        changes["train.activation_checkpointing"] = other.train.activation_checkpointing
    if other.quantize != plan.quantize:
        changes["quantize"] = other.quantize
    return f"{params(**changes)} ({amount(other.peak)})"


def _settings(plan: Plan) -> str:
    mode, numbers = plan.train.activation_checkpointing, plan.numerics
    product = f", products in {_name(numbers.product)}" if numbers.product else ""
    return (
        f"{plan.config.num_hidden_layers} layers in {_name(numbers.linear)}{product}, "
        f"micro_batch_tokens {plan.tokens_at_once}, activation_checkpointing {mode}"
    )


def course(plan: Plan) -> str:
    """Describe what the run will go through."""
    tokens, trained = plan.tokens()
    return (
        f"{plan.steps:,} steps of {plan.train.batch_size} samples, {tokens:,} tokens, {trained:,} of them trained; "
        "the time is known after the first steps"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spread(plan: Plan, run: RunConfig) -> Plan:
    """Plan with the base, or all that trains, spread over the processes, where that is asked for, or one GPU does not
    hold it.

    Args:
        plan: With it whole in each of them.
        run: The settings as they were given.

    Raises:
        UserError: It is asked for and cannot be.
    """
    processes, quantize, strategy = plan.processes, plan.quantize, run.strategy
    if strategy == "fsdp" and processes.size == 1:
        raise UserError(
            f"spreads the model over several processes, but there is one: raise {param('devices')}",
            parameter="strategy",
            value="fsdp",
        )
    if strategy == "fsdp" and quantize:
        raise UserError(
            f"spreads plain weights, not those of {param('quantize', quantize)}",
            parameter="strategy",
            value="fsdp",
            remedy="leave one of them out",
        )
    kind = plan.train.optimizer
    blocks = plan.method.whole and "8bit" in kind
    if strategy == "fsdp" and blocks:
        raise UserError(
            f"cuts what the optimizer remembers, which {param('train.optimizer', kind)} holds in blocks of 256 values",
            parameter="strategy",
            value="fsdp",
            remedy=f"use {param('train.optimizer', 'adamw')}, or {param('strategy', 'ddp')}",
        )
    able = processes.size > 1 and not quantize and not blocks and plan.numerics.device.type == "cuda"
    needed = processes.first(lambda: not plan.fits)
    if strategy == "fsdp" or (strategy == "auto" and able and needed):
        train = replace(plan.train, micro_batch_tokens=run.train.micro_batch_tokens)
        return fitted(replace(plan, train=train, processes=replace(processes, sharded=True)))
    return plan


def smaller(plan: Plan) -> Iterator[Plan]:
    """Yield plans of the run with settings that need less memory, the mildest changes first, each as far as it must go.

    A micro-batch is never cut below its longest sample, so a budget below that changes nothing.
    """
    longest = int(plan.laid["train"].lengths.max())
    modes = get_args(Checkpointing)
    for store in dict.fromkeys((plan.quantize, plan.quantize or _fewer_bits(plan))):
        for mode in modes[modes.index(plan.train.activation_checkpointing) :]:
            tokens = plan.tokens_at_once
            while True:
                other = plan.changed(mode, tokens, store)
                if other != plan:
                    yield other
                if other.resting > other.memory.total or other.comfortable or tokens <= longest:
                    break
                tokens = max(tokens // 2, longest)


def lighter(plan: Plan) -> list[Plan]:
    """List plans of the run with one setting changed by one notch, where that needs less memory."""
    train, modes = plan.train, get_args(Checkpointing)
    mode, tokens = train.activation_checkpointing, plan.tokens_at_once
    half = max(tokens // 2, int(plan.laid["train"].lengths.max()))
    changes = [(mode, half, plan.quantize), *((other, tokens, plan.quantize) for other in modes)]
    changes.append((mode, tokens, plan.quantize or _fewer_bits(plan)))
    found = [plan.changed(*change) for change in changes]
    return [other for other in found if other.peak < plan.peak]


def _fewer_bits(plan: Plan) -> Quantization | None:
    """How the base could be stored in less, if it can: not what trains, and not what is spread over processes."""
    return None if plan.method.whole or plan.processes.sharded else "nf4"
