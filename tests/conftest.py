"""Tiny models and the few real files that tests share; what is absent is skipped with the reason."""

import contextlib
import gc
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import known_passes
import numpy as np
import pytest
import torch
from cores import ALLOWED, on_cores, on_the_cpu
from fake_hub import hub as hub  # a fixture

from lit_llama.commands import Commands
from lit_llama.console import verbose
from lit_llama.folder.publish import write_json
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.adapters.peft_folder import save_adapter
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.files.checkpoint import fingerprint, load_model
from lit_llama.model.llama import LLaMA
from lit_llama.text.config import StyleName
from lit_llama.text.dataset.writer import Samples, SplitWriter, finish
from lit_llama.text.message import Conversation
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.prompts.encode import named_style
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.wording import Wording, word_as

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup; what the tests start would inherit it
        signal.signal(number, handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
verbose()  # tests read what is said
word_as(Commands())  # as doors name things
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nExtract the order as JSON: item, quantity.\n\n### Response:",
    '{"item": "blue lamp", "quantity": 2}',
    "<user> <assistant> system 0123456789 Zoë's naïve café, 北京 is a city. 😀",
] * 4


def tiny_config(**changes: object) -> LLaMAConfig:
    """Two layers, grouped queries, heads of 16, so that no two sizes are equal by chance."""
    shape: dict[str, object] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    return LLaMAConfig(**(shape | changes))  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> LLaMA:
    """A random model whose weights are large enough for its outputs to differ visibly."""
    torch.manual_seed(seed)
    model = LLaMA(tiny_config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model.requires_grad_(False).eval()


def as_transformers(model: LLaMA) -> Any:
    """The same weights in transformers' implementation, in float32 and with its plainest attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.to_dict("float32"), attn_implementation="eager")
    other = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    other.load_state_dict(model.state_dict())
    return other


@dataclass
class Sample:
    """Ids and labels of one sample."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0


def samples_of(encoded: Encoded) -> list[Sample]:
    """What lies end to end, one by one."""
    ends = np.cumsum(encoded.batch.lengths)
    columns = [np.split(column, ends)[:-1] for column in (encoded.batch.input_ids, encoded.batch.labels)]
    return [
        Sample(ids.tolist(), labels.tolist(), conversation.row)
        for ids, labels, conversation in zip(*columns, encoded.conversations, strict=True)
    ]


def encode_examples(
    examples: Iterable[Conversation], style: PromptStyle, tokenizer: Tokenizer, **options: Any
) -> tuple[list[Sample], Encoded]:
    """Samples of instructions and their answers."""
    encoder = Encoder(tokenizer, style, **{"max_seq_length": 10_000, **options})
    encoded = encoder.encode(encoder.render(list(examples)))
    return samples_of(encoded), encoded


def write_splits(folder: Path, splits: Mapping[str, Sequence[Sample]]) -> None:
    """A saved `datasets.DatasetDict`, in batches of 1000."""
    for name, samples in splits.items():
        writer = SplitWriter(folder / name)
        for start in range(0, len(samples), 1000):
            part = samples[start : start + 1000]
            ids, labels = (
                np.array([i for sample in part for i in getattr(sample, column)], np.int32)
                for column in ("input_ids", "labels")
            )
            writer.add(Samples(ids, labels, np.array([len(sample.input_ids) for sample in part])))
        writer.close()
    finish(folder, list(splits))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 384 ids with ChatML's control tokens, as a Hugging Face folder holds it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    (folder / "chat_template.jinja").write_text(CHATML)


LONGEST = {
    *("test_planned_memory", "test_plan", "test_preference_processes", "test_processes", "test_resume"),
    *("test_attack", "test_rows_road", "test_contest", "test_python_docs", "test_ray_executor"),
}
"""Modules of tests that take the longest."""


def pytest_configure(config: pytest.Config) -> None:
    """Make, ahead of the workers, the folder of what they tell each other. No garbage is looked for until all tests
    are collected, which takes a quarter of the time of that."""
    config.add_cleanup(known_passes.begin())
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what tests make, and no more among all modules."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first, as otherwise one worker is still at them when the other has nothing left."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def python_names() -> Iterator[None]:
    """Parameters and calls are named as in a notebook."""
    before = word_as(Wording())
    yield
    word_as(before)


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """A core of its own for each process of the tests and all that it starts, which then takes one thread: tiny steps
    cost several times as much where two threads wait for each other, above all on a busy machine."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    number = int(worker.removeprefix("gw")) if worker else os.getpid()
    with on_cores({sorted(ALLOWED)[number % len(ALLOWED)]}):
        yield


@pytest.fixture(autouse=True)
def threads_are_as_before() -> Iterator[None]:
    """A test that leaves two threads on its one core makes all tests after it many times slower."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def passes_are_counted_once() -> Iterator[None]:
    """What a pass of a shape takes is found once for all processes."""
    with pytest.MonkeyPatch.context() as patch:
        known_passes.keep(patch)
        yield


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test computes: once on the CPU, whatever else is there, and once on a GPU."""
    with on_the_cpu() if request.param == "cpu" else on_cores(ALLOWED):  # a GPU is fed by threads
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a random model, written by transformers, and its tokenizer. Do not change it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        **tiny_config().to_dict("float32")
        | {"eos_token_id": 2, "bos_token_id": 1, "initializer_range": 0.15, "tie_word_embeddings": True}
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model in LLaMA's manner: BPE, byte pieces, nothing normalised."""
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


@pytest.fixture
def beside(trained_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with a sentencepiece model, by default the trained one, and the JSON files given by name."""

    def write(model: Path | None = None, **files: object) -> Path:
        folder = tmp_path / "beside"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes((model or trained_model).read_bytes())
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return folder

    return write


def write_adapter(
    folder: Path,
    base: Path,
    *,
    style: StyleName | None = "alpaca",
    targets: list[str] | None = None,
    std: float = 0.2,
    seed: int = 0,
) -> Path:
    """An adapter folder as finetune/lora.py leaves it, with random A and B."""
    model, config = load_model(base), LoRAConfig(r=4, alpha=8, target_modules=targets or "all-linear")
    apply_lora(model, config)
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=std)
    folder.mkdir(parents=True)
    if style:
        (folder / "chat_template.jinja").write_text(named_style(style).jinja(bos=False))
    write_json(folder / "meta.json", {"format": 1, "base": {"path": str(base), "fingerprint": fingerprint(base)}})
    save_adapter(model, config, folder, str(base))
    return folder


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """Write a file into a fresh folder; gives its path."""

    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def files(tiny_folder: Path) -> dict[str, bytes]:
    """What a usable repository on the Hub holds."""
    return {path.name: path.read_bytes() for path in sorted(tiny_folder.iterdir())}


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """SmolLM2-135M-Instruct as `make test` and `make demo` convert it."""
    if not ((folder := ROOT / "checkpoints" / "smollm2-135m-instruct") / "config.json").is_file():
        pytest.skip(f"{folder} is absent; `make test` makes it")
    return folder


def shared(name: str) -> Path:
    """A file of the data collection beside the project."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is absent from the data beside the project")
    return path


@pytest.fixture(scope="session")
def llama_tokenizer() -> Path:
    """The original LLaMA sentencepiece model."""
    return shared("llama_tokenizer.model")


@pytest.fixture(scope="session")
def alpaca_file() -> Path:
    """999 rows in Alpaca's format with long answers."""
    return shared("alpaca_en_demo.json")


@pytest.fixture
def alpaca_rows(tmp_path: Path) -> Callable[[list[dict[str, str]]], Path]:
    """Write rows to data/rows.json in a fresh folder; gives the folder."""

    def write(rows: list[dict[str, str]]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        return folder

    return write


def run_door(*arguments: object, stdin: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a door as a user does: `run_door("prepare/alpaca.py", "--seed", 1)`."""
    script, *flags = map(str, arguments)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, input=stdin, cwd=cwd, timeout=240
    )


def run_here(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, which would spend seconds on importing torch."""
    script, *flags = map(str, arguments)
    out, err, status, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [script, *flags]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())
