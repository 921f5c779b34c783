"""A run: read, check, build, train, and publish the folder of the result."""

import hashlib
import platform
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_llama.console import is_heard
from lit_llama.device import (
    Numerics,
    cores,
    describe,
    keep_freed_memory,
    pick_device,
    process_kept,
    return_freed_memory,
    seed_everything,
    trim_freed_memory,
)
from lit_llama.errors import Interrupted, NumericalError, UserError
from lit_llama.folder.lock import claim
from lit_llama.folder.manifest import forget
from lit_llama.folder.publish import check_space, encode_json, publish, replace_file, replace_text, write_json
from lit_llama.memory import amount
from lit_llama.model.adapters.lora import many
from lit_llama.model.assemble import Assembled, assemble
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA
from lit_llama.progress import stderr
from lit_llama.text.dataset.folder import META_FILE
from lit_llama.text.inspect.report import look_at
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.train.asked import Run
from lit_llama.train.config import RUN_FILE, RunConfig
from lit_llama.train.distributed.processes import join
from lit_llama.train.distributed.shards import gather, is_spread, local, put, read_tensors, shard, write_tensors
from lit_llama.train.inputs import Inputs, fitting, read_inputs
from lit_llama.train.interrupt import Interrupt
from lit_llama.train.logs.log import SAVE_SECONDS, Log, Silence
from lit_llama.train.logs.loggers import check_loggers
from lit_llama.train.logs.metrics import METRICS, PAIR_METRICS, draw_curve
from lit_llama.train.logs.report.run_report import REPORT_JSON, write_run_report
from lit_llama.train.logs.sampler import Sampler
from lit_llama.train.loop import Progress, Trainer, fit
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.plan import Plan, make_plan
from lit_llama.train.memory.plan_table import advice, course, does_not_fit, explained, short, spread
from lit_llama.train.methods.method import Method
from lit_llama.train.methods.preference import read_reference, write_reference
from lit_llama.train.optim import check_optimizer, optimizer_tensors, restore_optimizer, write_optimizer
from lit_llama.train.rate import resolved
from lit_llama.train.state import (
    clear,
    find_states,
    read_record,
    save_state,
    set_aside,
    step_of,
)
from lit_llama.train.stopping import Best
from lit_llama.wording import param

BEST_FILE = "best.safetensors"
"""In a state, the weights with the lowest test loss so far, where those are to be kept."""


def finetune(method: Method, config: RunConfig, *, owns_process: bool = False) -> Plan:
    """Train and write the folder of the result; generators and threads of the process are put back at the end.

    run.yaml, meta.json, metrics.csv, the report and states/ grow during the run; the folder is a result once the
    method's marker is there, at the end.

    Args:
        method: Which weights train, and how they are written.
        config: The run; more than one process only where `launch` has started them.
        owns_process: Tune the allocators of the process for the run, for good, as a command does.

    Returns:
        What the run was planned to need.

    Raises:
        UserError: Settings, checkpoint, data or states that do not fit each other.
        LockedError: Another process works in `out_dir`.
        NumericalError: Too many steps in a row were not finite.
        ResourceError: A state could not be written.
        Interrupted: A signal came; the state is saved.
    """
    start = time.perf_counter()
    check_loggers(config.all_loggers)
    with join(config.devices, config.num_nodes) as processes:
        run = Run(method, config, config.settings(method.own), processes)
        processes.first(run.check_out_dir)
        with process_kept(), claim(config.out_dir) if processes.is_first else nullcontext():
            return _run(run, start, owns_process)


def _run(run: Run, start: float, owns_process: bool) -> Plan:
    """Read and check everything, then train."""
    if run.processes.is_first:
        clear(run.states)
    state = run.processes.first(lambda: run.find_state(run.config.resume))
    inputs = read_inputs(run.config.base, run.config.data_dir, run.method.rows)
    fitted, remarks = fitting(run.train, inputs.splits, run.config.data_dir)
    fitted, rate = run.processes.first(lambda: resolved(run.method, fitted, inputs.config, len(inputs.train), state))
    run = run.with_train(fitted)
    if rate:
        run = run.with_rate(fitted.highest_rate)
    for remark in (*remarks, *rate) if run.processes.is_first else ():
        stderr().print(remark)
    plan = make_plan(run.method, run.config, inputs.config, inputs.splits, processes=run.processes)
    plan = spread(plan, run.config)
    run = replace(run, processes=plan.processes)
    check_optimizer(run.train.optimizer, plan.numerics.device)
    identity = run.identity(inputs, plan.numerics)
    run = run.with_train(plan.train)  # with what the plan has made of auto
    run.processes.check_same("checkpoint, data or setting", identity)
    if run.processes.first(lambda: run.has_ended(state, identity, len(inputs.train))):
        return plan
    with explained(plan):
        _execute(run, inputs, identity, plan, state, start, owns_process)
    return plan


def _execute(
    run: Run,
    inputs: Inputs,
    identity: Mapping[str, Any],
    plan: Plan,
    state: Path | None,
    start: float,
    owns_process: bool,
) -> None:
    """Build, train and publish."""
    numerics, device, processes = plan.numerics, plan.numerics.device, run.processes
    stderr().print(f"plan: {short(plan)}\nplan: {course(plan)}")
    if not plan.fits:
        stderr().print(f"warning: {does_not_fit(plan)}; {advice(plan)}")
    if processes.is_first:  # for a state, and for the result beside it
        check_space(run.out_dir, plan.sizes.trained_bytes + plan.saved)
    assembled, loss_of = build(run.method, run.config, plan, owns_process)
    model = assembled.model
    if processes.is_first:
        replace_text(run.out_dir / RUN_FILE, yaml.safe_dump(dict(run.arguments), sort_keys=False))
    steps = run.train.steps(len(inputs.train))
    with _log(run, model, inputs, steps, plan) as log:
        groups = run.method.groups(model, run.train.weight_decay)
        trainer = Trainer(
            model,
            groups,
            inputs.train,
            inputs.test,
            run.train,
            run.config.seed,
            log.say,
            numerics,
            processes,
            loss_of,
        )
        training = _Training(run, inputs, identity, model, trainer, log, numerics)
        if state:
            training.restore(state, read_record(state))
        processes.check_same("adapter", training.digest())
        if processes.is_first:
            forget(run.out_dir, META_FILE)  # of a result that is made longer; the rest of it stays proven
            replace_file(run.out_dir / META_FILE, encode_json(training.meta(steps)))
        log.say(
            f"{training.trainable:,} trainable parameters {assembled.trains}, base in "
            f"{run.config.quantize or numerics} on {device}; {len(inputs.train)} rows, {trainer.steps} steps of "
            f"{run.train.batch_size}; ready in {time.perf_counter() - start:.1f} s"
        )
        training.go()
    gather(processes, training.tensors(), lambda given: _publish(run, training, given, log, start))


def build(method: Method, config: RunConfig, plan: Plan, owns_process: bool) -> tuple[Assembled, TokenLoss]:
    """Load the base of a run and put on it what trains; threads and generators of the process are set for the run.

    Returns:
        The model, and with its loss, spread over the processes where that is planned.
    """
    numerics, device, processes = plan.numerics, plan.numerics.device, plan.processes
    if owns_process:
        return_freed_memory()  # what is read for a moment is not there beside the next
    torch.set_num_threads(max(1, cores() // processes.here))
    seed_everything(config.seed)
    loaded = "cpu" if processes.sharded else device
    load = partial(load_model, config.base, loaded, numerics.rest, config.quantize, numerics.linear, mapped=False)
    assembled = assemble(load, replace(plan.build.assembly(method.begin), device=device))
    loss_of = method.loss_of(assembled.model, numerics, processes)
    if processes.sharded:
        shard(loss_of, device, processes.size)
    stderr().print(assembled.describe())
    if remark := many(assembled.model):
        stderr().print(remark)
    trim_freed_memory()
    if owns_process and plan.roomy:
        keep_freed_memory()
    return assembled, loss_of


def _publish(run: Run, training: "_Training", given: Mapping[str, Tensor], log: Log, start: float) -> None:
    """Make the folder of the run a result."""
    training.trainer.rest()
    draw_curve(run.out_dir)
    # Replaced is the result of a run that was made longer; and what a killed process left on the way is cleared away.
    with publish(run.out_dir, run.method.marker, replace=True) as folder:
        training.write_result(folder, given, exact=False)
    write_run_report(run.out_dir)
    for line in look_at(run.out_dir / REPORT_JSON):
        log.say(line)
    log.say(
        f"{run.out_dir}: {run.method.result}, report.html, metrics.csv, loss.png, run.yaml; "
        f"{time.perf_counter() - start:.1f} s, peak memory {amount(training.trainer.memory())}"
    )
    log.say(f"next: {run.method.next(run.out_dir)}")


@dataclass(frozen=True)
class _Training:
    """A run that is built: what is trained, and what its states and its result are made of."""

    run: Run
    inputs: Inputs
    identity: Mapping[str, Any]
    model: LLaMA
    trainer: Trainer
    log: Log
    numerics: Numerics

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def meta(self, steps: int) -> dict[str, Any]:
        """What the folder of the result says of itself after so many steps."""
        base = self.inputs.base | ({"quantize": self.run.config.quantize} if self.run.config.quantize else {})
        made = {
            "method": self.run.method.name,
            "trainable": self.trainable,
            "dtype": str(self.numerics),
            "vocab_size": self.inputs.config.vocab_size,
            "device": describe(pick_device()),
            "torch": torch.__version__,
        }
        return {"format": 1, "base": base, "data": self.inputs.data, "steps": steps, "run": made}

    def go(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: A signal came first.
        """
        try:
            with Interrupt(quiet=not (self.run.processes.is_first and is_heard())) as interrupt:
                fit(self.trainer, self.log, self.save, interrupt)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            states = find_states(self.run.states)
            saved = f"the newest state is that of step {step_of(states[-1])}" if states else "nothing is saved yet"
            raise Interrupted(number, f"Stopped at once; {saved}. Continue with: {self.run.command}") from None
        step, steps = self.trainer.progress.step, self.trainer.steps
        if interrupt.received and not self.trainer.ended:
            by = "" if interrupt.received == signal.SIGINT else f" by {interrupt.received.name}"
            raise Interrupted(
                interrupt.received,
                f"Stopped{by} after step {step} of {steps}; saved. Continue with: {self.run.command}",
            )
        self.trainer.check_learned()
        self.trainer.take_best()

    def digest(self) -> str:
        """Of the weights that train, where there are several processes in which they must be the same."""
        found = hashlib.sha256()
        for parameter in self.model.parameters() if self.run.processes.size > 1 else ():
            if parameter.requires_grad and not is_spread(parameter):
                found.update(parameter.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a state by name, each as this process has it."""
        moments = optimizer_tensors(self.model, self.trainer.optimizer)
        return dict(self.model.named_parameters(remove_duplicate=False)) | moments | self._best

    @property
    def _best(self) -> dict[str, Tensor]:
        """The best weights by their names in best.safetensors, where they are to be kept."""
        return {str(number): value for number, value in enumerate(self.trainer.kept)}

    def write_result(self, folder: Path, given: Mapping[str, Tensor], *, exact: bool) -> None:
        """The files of the result so far; a state holds them too, every bit, so that it can be tried out."""
        write_json(folder / META_FILE, self.meta(self.trainer.progress.step))
        (folder / TEMPLATE_FILE).write_text(self.inputs.template, "utf-8")
        self.run.method.write(self.model, folder, self.inputs, given, exact=exact)

    def save(self) -> None:
        """Save all that the next step depends on. Generators are not among it: every micro-batch seeds them itself."""
        step = self.trainer.progress.step
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        spoilt = next((n for n, (_, value) in enumerate(trained, 1) if not local(value).isfinite().all()), 0)
        if spoilt := self.run.processes.highest(spoilt, self.numerics.device):
            raise NumericalError(
                f"{trained[spoilt - 1][0]} is not finite after step {step}: no state of it is written, the one before "
                f"stays. Begin anew with a lower {param('train.learning_rate')}"
            )
        self.log.sync()

        def write(folder: Path, given: Mapping[str, Tensor]) -> dict[str, Any]:
            self.write_result(folder, given, exact=True)
            write_optimizer(self.model, self.trainer.optimizer, folder, given)
            write_reference(self.inputs.splits, folder)
            if best := self._best:
                write_tensors(folder / BEST_FILE, best, given.__getitem__)
            return {
                "progress": asdict(self.trainer.progress),
                "best": self.trainer.best.state(),
                "scaler": self.trainer.scaler.state_dict(),
                "identity": dict(self.identity),
                "environment": _environment(self.run),
            }

        def save(given: Mapping[str, Tensor]) -> None:
            save_state(self.run.states, step, lambda folder: write(folder, given), self.trainer.bytes())
            self.log.report(older=SAVE_SECONDS)

        gather(self.run.processes, self.tensors(), save)
        self.run.processes.wait()

    def restore(self, state: Path, record: Mapping[str, Any]) -> None:
        """Put the run where it was, and states that lie further on out of the way."""
        self.run.method.restore(self.model, state)
        restore_optimizer(self.model, self.trainer.optimizer, state)
        read_reference(self.inputs.splits, state)
        self.trainer.best = Best.from_state(record["best"])
        self.trainer.scaler.load_state_dict(record["scaler"])
        for name, value in read_tensors(state / BEST_FILE) if self.trainer.kept else ():
            put(self.trainer.kept[int(name)], value)
        self.trainer.progress = Progress(**record["progress"])
        self.run.processes.wait()  # until all have read it
        self.log.resume(self.trainer.progress.step)
        for other in find_states(self.run.states) if self.run.processes.is_first else ():
            if step_of(other) > self.trainer.progress.step:
                set_aside(other)
        now = _environment(self.run)
        changed = [f"{name} {was} (now {now[name]})" for name, was in record["environment"].items() if was != now[name]]
        if changed:
            self.log.say(f"{state} was written with {', '.join(changed)}: the last bits of what follows may differ")
        self.log.say(f"continuing from {state}")


def _log(run: Run, model: LLaMA, inputs: Inputs, steps: int, plan: Plan) -> Log:
    """What a run of so many steps tells, if this is the process that tells it."""
    if not run.processes.is_first:
        return Silence()
    return Log(
        run.out_dir,
        steps,
        sampler=_sampler(run, model, inputs.tokenizer, plan) if len(inputs.test) else None,
        loggers=run.config.all_loggers,
        columns=METRICS if run.method.rows == "samples" else PAIR_METRICS,
    )


def _sampler(run: Run, model: LLaMA, tokenizer: Tokenizer, plan: Plan) -> Sampler | None:
    """What answers the prompts of the report."""
    if not run.train.sample_prompts:
        return None
    if run.processes.sharded:  # every token would take a pass of all processes, each fetching all layers
        stderr().print(f"no sample answers: the model is spread over the processes ({param('strategy', 'fsdp')})")
        return None
    wanted = (run.train.sample_prompts, plan.tokens_at_once, plan.numerics, plan.packs_answers)
    try:
        return Sampler.from_folders(model, tokenizer, run.config.base, run.config.data_dir, *wanted)
    except UserError as error:
        stderr().print(f"no sample answers: {error}")
        return None


def _environment(run: Run) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the settings."""
    return {
        "processes": run.processes.size,
        "threads": torch.get_num_threads(),
        "device": pick_device().type,
        "micro_batch_tokens": run.train.micro_batch_tokens,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
