"""Beginning of a run: what it starts from, then its plan, or its processes and this one among them."""

from dataclasses import replace
from pathlib import Path

from lit_llama.device import keep_few_products
from lit_llama.errors import UserError
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, trained_on, verify_folders
from lit_llama.model.places import ADAPTER, DATA, MODEL, check_places
from lit_llama.progress import stderr
from lit_llama.train.config import RunConfig
from lit_llama.train.distributed.launch import launch
from lit_llama.train.methods.method import LoRA, Method
from lit_llama.train.methods.warm_start import find_base, read_start, remark_on_style
from lit_llama.train.rate import check_auto
from lit_llama.wording import call, param


def start(method: Method, config: RunConfig) -> None:
    """Print the plan where one is asked for, else train; see `print_plan`, `launch` and `finetune`.

    A command's own: it may start itself again for each device, and the process is tuned for the run.

    Args:
        method: What trains; without a start of its own.
        config: The run; without a base where an adapter names it.

    Raises:
        UserError: As `begin`.
    """
    keep_few_products()
    method, config = begin(method, config)
    if config.only_planned:
        from lit_llama.train.memory.plan_table import print_plan

        return print_plan(method, config)
    launch(config.devices, config.num_nodes)
    from lit_llama.train.run import finetune

    finetune(method, config, owns_process=True)


def begin(method: Method, config: RunConfig) -> tuple[Method, RunConfig]:
    """Complete a method and a run by the adapter that they go on with, where there is one.

    Args:
        method: What trains; without a start of its own.
        config: The run; without a base where an adapter names it.

    Raises:
        UserError: There is no base, or one that is an adapter; or no learning rate auto for such a run.
    """
    base, adapter = config.checkpoint_dir, config.adapter_dir
    check_auto(method, config.train)
    if base is not None and (adapter is None or (adapter / CONFIG_FILE).is_file()):  # else they may be swapped
        _check_base(base, method)
    own = {"adapter_dir": ADAPTER} if isinstance(method, LoRA) else {}
    given = {"checkpoint_dir": base, "adapter_dir": adapter, "data_dir": config.data_dir}
    check_places({"checkpoint_dir": MODEL, "data_dir": DATA} | own, given, optional=("adapter_dir",))
    if config.verify:
        verify_folders(base, adapter, config.data_dir, base_dir=base if adapter else None)
    if adapter is not None:
        return _begin_with(adapter, method, config)
    return method, config


def _check_base(folder: Path, method: Method) -> None:
    """Refuse an adapter where a model is expected, with what can be done with it."""
    if (folder / "config.json").is_file() or not (folder / CONFIG_FILE).is_file():
        return
    merge = call("merge", adapter_dir=folder, destination_path=f"{folder}-merged")
    ways = f"give it as {param('adapter_dir', folder)} to go on training it, or m" if isinstance(method, LoRA) else "m"
    raise UserError(
        f"is an adapter and no model: {ways}ake it part of its base first, with {merge}",
        parameter="checkpoint_dir",
        value=folder,
    )


def _begin_with(adapter: Path, method: Method, config: RunConfig) -> tuple[LoRA, RunConfig]:
    """The method that goes on with an adapter, and the run on its base, held as it was."""
    assert isinstance(method, LoRA)
    base = find_base(adapter, config.checkpoint_dir)
    shape, begun = read_start(adapter, base, method.config)
    remark_on_style(adapter, config.data_dir)
    trained = trained_on(adapter)
    if trained != config.quantize:
        kind = f"on a base in {trained}" if trained else "on a base that was not quantised"
        now = f"; it goes on on one in {config.quantize}" if config.quantize else ", and goes on so"
        stderr().print(f"{adapter} was trained {kind}{now}")
    held = config.quantize or trained
    return replace(method, config=shape, start=begun), replace(config, checkpoint_dir=base, lora=shape, quantize=held)
