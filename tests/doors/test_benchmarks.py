"""Tests of the benchmarks' own pieces; no peer is needed."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_adapter

from benchmarks import bases
from benchmarks.training import contest, environments, ours, peer_litgpt, peer_trl, process, show
from benchmarks.training.compare import DRAWN_LIMITS, Speed, agreement, speed, summary
from benchmarks.training.contest import CONTENDERS, OURS
from benchmarks.training.job import OPTIONS, Course, Job
from benchmarks.training.rows import IGNORE_INDEX, Rows, load_rows, save_rows
from lit_llama.device import peak_memory
from lit_llama.errors import IntegrityError, ResourceError
from lit_llama.generate.llm import load
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model

Samples = list[tuple[Any, Any]]


def samples(*lengths: int, seed: int = 0) -> Samples:
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = draw.integers(3, 300, length, dtype=np.int32)
        made.append((ids, np.where(np.arange(length) < length // 2, np.int32(IGNORE_INDEX), ids)))
    return made


def rows_of(*lengths: int, steps: list[list[int]]) -> Rows:
    return Rows(samples(*lengths), samples(4, 9, seed=1), steps)


def equal(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


# rows


def test_rows_come_back_as_they_were_dumped(tmp_path: Path) -> None:
    rows = rows_of(5, 2, 11, 7, steps=[[2, 0], [3, 1]])
    save_rows(rows, tmp_path / "rows.npz")
    found = load_rows(tmp_path / "rows.npz")
    assert equal(found.train, rows.train)
    assert equal(found.held_out, rows.held_out)
    assert found.steps == rows.steps


def test_rows_of_a_step_are_counted_without_their_first_label() -> None:
    ids = np.arange(4, dtype=np.int32)
    rows = Rows([(ids, ids), (ids, np.array([IGNORE_INDEX, 1, IGNORE_INDEX, 3], np.int32))], [], [[0, 1]])
    assert (rows.trained_tokens(0), rows.tokens(0)) == (3 + 2, 8)


def test_pairs_come_back_and_are_counted_with_the_prompt_of_each_answer(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    train = [tuple(draw.integers(3, 9, n, dtype=np.int32) for n in lengths) for lengths in ((4, 2, 5), (3, 7, 1))]
    save_rows(Rows(train, train[:1], [[0, 1]]), tmp_path / "rows.npz")
    found = load_rows(tmp_path / "rows.npz")
    assert equal(found.train, train) and equal(found.held_out, train[:1])
    assert (found.trained_tokens(0), found.tokens(0)) == (2 + 5 + 7 + 1, 2 * 4 + 7 + 2 * 3 + 8)
    assert [len(prompt) for prompt, _, _ in found.ordered(1, by_length=True)] == [3, 4]  # 3 + 7 is longer than 4 + 5


def test_order_by_length_never_leaves_a_step() -> None:
    rows = rows_of(5, 2, 11, 7, steps=[[1, 0], [3, 2]])
    plain, sorted_ = (rows.ordered(2, by_length=by) for by in (False, True))
    assert [len(sample[0]) for sample in plain] == [2, 5, 7, 11]
    assert [len(sample[0]) for sample in sorted_] == [5, 2, 11, 7]
    assert len(rows.ordered(1, by_length=True)) == 2


# jobs


def test_a_job_is_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path, tuned=True)
    monkeypatch.setattr(sys, "argv", ["", str(job.write(tmp_path))])
    assert Job.read() == job


def tiny_job(folder: Path, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "checkpoint_dir": "base",
        "data_dir": "data",
        "rows_file": "rows.npz",
        "start_file": "",
        "out_dir": str(folder / "run" / "adapter"),
        "steps": 2,
        "batch_size": 4,
        "micro_batch": 2,
        "learning_rate": 1e-3,
        "r": 2,
        "alpha": 4,
        "seed": 1,
    }
    return Job(**settings | changes)


def test_a_course_takes_the_time_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.5, 14.0, 20.0, 21.0])  # at each beginning and each end
    monkeypatch.setattr("benchmarks.training.job.time", SimpleNamespace(monotonic=lambda: next(clock)))
    course = Course()
    course.begin()
    course.step(2.0)
    course.step(1.0, seconds=0.5, trained_tokens=7)
    assert course.losses == [2.0, 1.0]
    assert course.seconds == [3.5, 0.5]
    assert course.trained_tokens == [7]
    assert course.first_step == 13.5


def test_a_quantised_base_is_a_flag_of_ours(tmp_path: Path) -> None:
    assert "--quantize=fp8" in ours.flags(tiny_job(tmp_path, quantize="fp8"))
    assert not any("quantize" in flag for flag in ours.flags(tiny_job(tmp_path)))


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_the_same_for_all(option: str, tmp_path: Path) -> None:
    """Each setting of ours has its twin in TRL's and PEFT's words, and no other flag moves."""
    job = tiny_job(tmp_path, option=option)
    plain, found = (set(ours.flags(each)) for each in (replace(job, option=""), job))
    named = {flag.partition("=")[0] for flag in plain ^ found}
    theirs = {
        "dropout": {"--lora.dropout"},
        "dora": {"--lora.use_dora"},
        "rslora": {"--lora.use_rslora"},
        "neftune": {"--train.neftune_noise_alpha"},
        "bf16-mixed": {"--precision"},
        "full": {"--lora.r", "--lora.alpha", "--lora.dropout"},
    }
    assert named == theirs.get(option, set())
    changed = peer_trl.arguments(job).items() - peer_trl.arguments(replace(job, option="")).items()
    assert dict(changed) == OPTIONS[option].arguments
    assert (OPTIONS[option].lora is None) == (option == "full")
    for fast in (True, False):
        tuned = peer_trl.arguments(replace(job, tuned=True, bfloat16=fast))
        mixed = option in ("bf16-mixed", "full")
        assert tuned["model_init_kwargs"] == {"dtype": "bfloat16" if fast and not mixed else "float32"}
        assert tuned.get("bf16", False) == (fast and mixed)


def test_losses_on_a_base_are_those_of_the_model_before_and_after(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a loss of untrained tokens, labels that are not shifted, and an adapter that is left out."""
    rows, adapter = rows_of(5, steps=[[0]]), write_adapter(tmp_path / "adapter", tiny_folder)
    before, after = bases._held_out(tiny_folder, adapter, "", rows)
    models = load_model(tiny_folder, dtype=torch.float32), load(adapter, precision="32-true", packed=False).model
    for found, model in zip((before, after), models, strict=True):
        total, count = 0.0, 0
        for ids, labels in rows.held_out:
            logits = model(torch.from_numpy(ids).long())[:-1].log_softmax(-1)
            picked = [-logits[place, label].item() for place, label in enumerate(labels[1:]) if label != IGNORE_INDEX]
            total, count = total + sum(picked), count + len(picked)
        assert found == pytest.approx(total / count, rel=1e-5)
    assert abs(before - after) > 1e-3


# comparison


def test_agreement_is_held_to_each_of_its_limits() -> None:
    wanted = [2.0, 1.5, 1.0, 0.5, 0.4]
    assert agreement(wanted, 1.0, wanted, 1.0).holds
    assert agreement([2.009, *wanted[1:]], 1.0, wanted, 1.0).holds  # one step, and little on average
    assert not agreement([2.011, *wanted[1:]], 1.0, wanted, 1.0).holds  # per step
    assert not agreement([loss + 0.003 for loss in wanted], 1.0, wanted, 1.0).holds  # mean
    assert not agreement(wanted, 1.003, wanted, 1.0).holds  # held out
    assert not agreement([math.nan, *wanted[1:]], 1.0, wanted, 1.0).holds
    assert agreement([2.05, *wanted[1:]], 1.01, wanted, 1.0, DRAWN_LIMITS).holds
    assert not agreement([2.05, *wanted[1:]], 1.03, wanted, 1.0, DRAWN_LIMITS).holds
    with pytest.raises(ValueError, match="zip"):
        agreement(wanted[:-1], 1.0, wanted, 1.0)


def test_speed_is_that_of_the_median_run_after_the_warm_up() -> None:
    runs = [{"seconds": [90.0, x, x], "peak_rss": int(x), "first_step": 10 * x} for x in (1.0, 4.0, 2.0)]
    found = speed(runs, warmup=1, samples=32, trained_tokens=800, tokens=1600)
    assert found == Speed(8.0, 16.0, 200.0, 400.0, 4, 10.0, 3, with_reference=8.0)


def test_the_reference_of_preferences_is_shared_out_over_their_rows() -> None:
    runs = [{"seconds": [9.0, 2.0, 2.0], "peak_rss": 1, "first_step": 1.0, "reference": 6.0}]
    found = speed(runs, warmup=1, samples=8, trained_tokens=1, tokens=1, rows=24)
    assert found.samples == 2.0
    assert found.with_reference == 8 / (4 + 8 * 6 / 24)


def line(name: str, samples_per_second: float, *, held_out: float = 1.0) -> dict[str, Any]:
    made = Speed(samples_per_second, samples_per_second, 1.0, 2.0, 10**9, 3.0, 1, samples_per_second)
    return summary(name, made, agreement([1.0], held_out, [1.0], 1.0), Speed(8, 8, 1, 2, 5 * 10**8, 3, 1, 8), {})


def test_the_table_gives_ratios_and_says_what_is_not_comparable(tmp_path: Path) -> None:
    lines = [line(OURS, 8.0), line("peer", 2.0), line("other", 4.0, held_out=1.01)]
    text = show.table(lines).splitlines()
    assert "x4.00" in text[2] and "not comparable" not in text[2]
    assert "x2.00" in text[3] and text[3].endswith("not comparable")
    assert lines[1]["memory_of_ours"] == 2.0
    assert "with ref." not in text[0]
    lines[1]["with_reference"] = 1.5
    assert show.table(lines).splitlines()[2].split()[-1] == "1.50"
    show.plot(lines, tmp_path / "bars.png", "title")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


# processes


def test_a_program_is_measured_by_itself(tmp_path: Path) -> None:
    done = process.run([sys.executable, "-c", "x = b'1' * 300_000_000; print(len(x))"], tmp_path / "log")
    assert done.stdout == "300000000\n"
    # The kernel lets a program begin with the peak of the one that started it.
    assert 300e6 < done.peak_rss < 400e6 + peak_memory(torch.device("cpu"))
    assert done.seconds > 0
    assert 0 <= done.busy_before <= 1


def test_a_program_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"status 3, see .*log: nothing works"):
        process.run(
            [sys.executable, "-c", "import sys; print('nothing works', file=sys.stderr); exit(3)"], tmp_path / "log"
        )


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(process.os, "getloadavg", lambda: (0.7, 0.0, 0.0))
    with pytest.raises(ResourceError, match=r"load average is 0\.70, expected 0\.5"):
        process.check_idle(0.5, warn=False)
    assert process.check_idle(0.5, warn=True) == 0.7
    assert "WARNING" in capsys.readouterr().err
    assert process.check_idle(0.8, warn=False) == 0.7


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(environments.venv, "create", lambda home, **_: home.mkdir(parents=True))
    monkeypatch.setattr(environments, "_pip", lambda python, *words, environment: calls.append(words))
    for _ in range(2):
        assert environments.python_of("litgpt", tmp_path) == tmp_path / "litgpt" / "bin" / "python"
    assert len(calls) == 2  # what it needs, then itself without its own list
    assert "torch==2.13.0" in calls[0]
    assert calls[1][0] == "--no-deps"


# the peers' adapters


def test_the_start_reaches_every_layer_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    from conftest import as_transformers, tiny_model

    made = peft.get_peft_model(
        as_transformers(tiny_model()), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    start = {
        name.replace(".default.", "."): torch.full_like(value, 0.5)
        for name, value in made.named_parameters()
        if ".lora_A." in name
    }
    peer_trl.begin_with(made, start)
    for name, value in made.named_parameters():
        assert not value.requires_grad or (value == (0.5 if ".lora_A." in name else 0)).all()
    start.popitem()
    with pytest.raises(ValueError, match="other layers"):
        peer_trl.begin_with(made, start)


def test_litgpt_gives_back_the_start_by_the_same_names(tiny_folder: Path) -> None:
    """Queries, keys and values lie in one matrix there."""
    model = load_model(tiny_folder)
    apply_lora(model, LoRAConfig(r=2, alpha=4))
    config = model.config
    start = {f"base_model.model.{name}.lora_A.weight": m.lora_A.detach() for name, m in adapters(model)}
    state = peer_litgpt.to_litgpt(start, config.num_hidden_layers)
    widths = {name: m.lora_B.shape[0] for name, m in adapters(model)}
    for name in list(state):
        layer, _, part = name.removeprefix("transformer.h.").removesuffix(".lora_A").partition(".")
        ours = [f"model.layers.{layer}.{n}" for n in peer_litgpt.QKV]
        if part != "attn.qkv":
            ours = [f"model.layers.{layer}.{peer_litgpt.NAMES[part]}"]
        state[name.replace("lora_A", "lora_B")] = torch.cat([torch.full((widths[n], 2), hash(n) % 97.0) for n in ours])
    shape = SimpleNamespace(
        head_size=config.head_dim,
        n_head=config.num_attention_heads,
        n_query_groups=config.num_key_value_heads,
        n_layer=config.num_hidden_layers,
        lora_r=2,
    )
    found = peer_litgpt.to_peft(state, shape)
    assert {name: value.shape for name, value in found.items() if "lora_A" in name} == {
        name: value.shape for name, value in start.items()
    }
    assert all(torch.equal(found[name], start[name]) for name in start)
    for name, width in widths.items():
        b = found[f"base_model.model.{name}.lora_B.weight"]
        assert b.shape == (width, 2) and (b == hash(name) % 97.0).all()


def test_other_rows_are_noticed(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, steps=1)
    folder = tmp_path / "run"
    folder.mkdir()
    course = Course()
    course.step(1.0, trained_tokens=3)
    course.write(job)
    done = process.Done("", 0.0, 1.0, 1, 0.0)
    with pytest.raises(IntegrityError, match=r"trained on \[3\] tokens, expected \[5\]"):
        contest._result(folder, job, rows_of(4, 6, steps=[[0, 1]]), done)


def test_stock_and_tuned_share_a_program() -> None:
    assert [name for name, contender in CONTENDERS.items() if contender.tuned] == [
        "TRL + PEFT, tuned",
        "litgpt, tuned",
    ]
