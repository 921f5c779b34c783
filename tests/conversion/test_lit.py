"""lit-llama's files, base and LoRA, written here part by part; compared with the plain model and with PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from meta_files import IDS, equal, nothing_left, swapped
from plain import Sizes, State, logits, native, random_state, write_sentencepiece
from safetensors.torch import load_file

from lit_llama.conversion import convert
from lit_llama.conversion.layouts.lit_llama import _EPS, convert_lit_lora, open_lit, write_lit
from lit_llama.conversion.native import open_folder
from lit_llama.errors import CheckpointError, IntegrityError, UserError
from lit_llama.model.adapters.peft_folder import base_of, load_adapter, read_adapter_config
from lit_llama.model.files.checkpoint import load_model

SIZES = Sizes(dim=256, n_heads=2, n_kv_heads=2, ffn=768)  # heads of 128, as lit-llama has them
INNER = {
    "attention.wo": "attn.c_proj.weight",
    "feed_forward.w1": "mlp.c_fc1.weight",
    "feed_forward.w3": "mlp.c_fc2.weight",
    "feed_forward.w2": "mlp.c_proj.weight",
    "attention_norm": "rms_1.scale",
    "ffn_norm": "rms_2.scale",
}
OUTER = {"tok_embeddings": "transformer.wte.weight", "norm": "transformer.ln_f.scale", "output": "lm_head.weight"}


def lit_state(state: State) -> State:
    """The same weights as lit-llama stores them: rows of q, then of k, then of v."""
    found: State = {}
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            found[OUTER[stem]] = value
        elif (rest := stem.split(".", 2)[2]) in INNER:
            found[f"transformer.h.{stem.split('.')[1]}.{INNER[rest]}"] = value
    for layer in range(SIZES.n_layers):
        rows = [row for part in "qkv" for row in state[f"layers.{layer}.attention.w{part}.weight"]]
        found[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.stack(rows)
    return found


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(SIZES)


@pytest.fixture
def lit_file(tmp_path: Path, state: State) -> Path:
    """A file as lit-llama's converter leaves it, the tokenizer in the folder above."""
    (tmp_path / "lit" / "7B").mkdir(parents=True)
    write_sentencepiece(tmp_path / "lit")
    torch.save(lit_state(state), tmp_path / "lit" / "7B" / "lit-llama.pth")
    return tmp_path / "lit" / "7B" / "lit-llama.pth"


@pytest.fixture
def base(tmp_path: Path, lit_file: Path) -> Path:
    convert(lit_file, tmp_path / "base", rms_norm_eps=1e-5)
    return tmp_path / "base"


def test_the_converted_model_is_the_original(base: Path, state: State) -> None:
    """Catches q, k and v in another order, a wrong permutation, name or epsilon."""
    assert equal(load_file(base / "model.safetensors"), native(state, SIZES))
    assert (load_model(base)(IDS) - logits(state, SIZES, IDS)).abs().max() <= 1e-4
    notes = json.loads((base / "meta.json").read_text())["source"]
    assert notes["rms_norm_eps"] == "as given by --rms_norm_eps"


def test_a_wrong_permutation_would_be_seen(
    tmp_path: Path, lit_file: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the test above."""
    monkeypatch.setattr("lit_llama.conversion.tensors.halves_from_pairs", swapped)
    convert(lit_file, tmp_path / "made", rms_norm_eps=1e-5)
    assert (load_model(tmp_path / "made")(IDS) - logits(state, SIZES, IDS)).abs().max() > 0.1


def test_there_and_back_is_the_same_to_the_last_bit(tmp_path: Path, lit_file: Path, base: Path) -> None:
    """Catches a permutation that is not undone, and matrices joined in another order."""
    convert(base, tmp_path / "back", layout="lit")
    wanted = torch.load(lit_file, weights_only=True)
    assert equal(torch.load(tmp_path / "back" / "lit-llama.pth", weights_only=True), wanted)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (tmp_path / "lit" / "tokenizer.model").read_bytes()
    assert open_lit(tmp_path / "back", 1e-5).config == open_lit(lit_file, 1e-5).config


def test_rows_are_padded_as_lit_llama_pads_them(tmp_path: Path, base: Path, state: State) -> None:
    """Catches an embedding that lit-llama cannot load: its rows are a multiple of 64, the new ones zero."""
    source = open_folder(base)
    rows = 380
    cut = {name: tensor[:rows] if "embed" in name or "head" in name else tensor for name, tensor in
           native(state, SIZES).items()}  # fmt: skip
    specs = {name: ("F32", tuple(value.shape)) for name, value in cut.items()}
    smaller = replace(source, config={**source.config, "vocab_size": rows}, specs=specs, read=lambda name: cut[name])
    write_lit(smaller, tmp_path / "back")
    found = torch.load(tmp_path / "back" / "lit-llama.pth", weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert len(found[name]) == 384 and not found[name][rows:].any()
    assert torch.equal(found["lm_head.weight"][:rows], state["output.weight"][:rows])


def test_an_unknown_epsilon_is_asked_for(tmp_path: Path, lit_file: Path) -> None:
    """Catches an epsilon that is guessed."""
    with pytest.raises(CheckpointError, match=r"no LLaMA 1 has 2 layers of 256: give --rms_norm_eps"):
        convert(lit_file, tmp_path / "made")
    assert nothing_left(tmp_path / "made")
    assert _EPS == {(4096, 32): 1e-6, (5120, 40): 1e-6, (6656, 60): 1e-6, (8192, 80): 1e-5}


def test_an_epsilon_is_taken_only_where_the_file_has_none(tmp_path: Path, base: Path) -> None:
    """Catches a flag that is ignored in silence."""
    with pytest.raises(UserError, match=r"--rms_norm_eps: .* says its epsilon itself"):
        convert(base, tmp_path / "made", rms_norm_eps=1e-5, dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.rms_2.scale"), "1 missing (transformer.h.1.rms_2.scale"),
        (lambda tensors: tensors.update({"transformer.h.0.attn.adapter_wte.weight": torch.ones(1)}), "no LoRA"),
        (lambda tensors: tensors.pop("lm_head.weight"), "holds no weights of lit-llama or litgpt (found: "),
        (
            lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.weight": torch.ones(767, 256)}),
            "self_attn.k_proj.weight is (255, 256)",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, lit_file: Path, state: State, change: Any, message: str) -> None:
    """Catches tensors that are dropped in silence, such as those of LLaMA-Adapter."""
    tensors = lit_state(state)
    change(tensors)
    torch.save(tensors, lit_file)
    with pytest.raises(CheckpointError) as caught:
        convert(lit_file, tmp_path / "made", rms_norm_eps=1e-5)
    assert message in str(caught.value)
    assert nothing_left(tmp_path / "made")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 1, "head_dim": 128}, "num_key_value_heads is 1, lit-llama computes only 2"),
        ({"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 64}, "head_dim is 64"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0"),
        ({"intermediate_size": 700}, "intermediate_size is 700, lit-llama computes only 768"),
        ({"attention_bias": True, "attention_out_bias": True}, "bias has no place"),
    ],
)
def test_what_lit_llama_cannot_compute_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Catches a file that lit-llama loads and computes otherwise."""
    from conftest import tiny_model
    from safetensors.torch import save_file

    shape = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    model = tiny_model(**(shape | {"intermediate_size": 768} | changes))
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict("float32")))
    with pytest.raises(CheckpointError) as caught:
        write_lit(open_folder(folder), tmp_path / "back")
    assert message in str(caught.value)
    assert nothing_left(tmp_path / "back")


def write_lora(path: Path, r: int = 4, std: float = 0.2) -> State:
    """A LoRA of q and v as lit-llama saves it."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(SIZES.n_layers):
        stem = f"transformer.h.{layer}.attn.c_attn."
        tensors[f"{stem}lora_A"] = torch.randn(2 * r, SIZES.dim, generator=draw) * std
        tensors[f"{stem}lora_B"] = torch.randn(2 * SIZES.dim, r, generator=draw) * std
    torch.save(tensors, path)
    return tensors


def adapted(state: State, lora: State, scale: float) -> State:
    """The weights with the update of q and of v added, as lit-llama merges them."""
    found = dict(state)
    for layer in range(SIZES.n_layers):
        A, B = (lora[f"transformer.h.{layer}.attn.c_attn.lora_{part}"] for part in "AB")
        r = len(A) // 2
        for part, rows, columns in (("q", slice(0, r), slice(0, 256)), ("v", slice(r, 2 * r), slice(256, 512))):
            name = f"layers.{layer}.attention.w{part}.weight"
            found[name] = state[name] + scale * B[columns] @ A[rows]
    return found


@pytest.mark.parametrize("alpha", [16, 8])
def test_a_lora_of_lit_llama_becomes_a_peft_folder(tmp_path: Path, base: Path, state: State, alpha: int) -> None:
    """Catches parts of q and v that are exchanged, rows of B that are not moved, and another scale; PEFT agrees."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = write_lora(tmp_path / "lora.pth")
    convert_lit_lora(tmp_path / "lora.pth", base, tmp_path / "adapter", alpha)
    wanted = logits(adapted(state, lora, alpha / 4), SIZES, IDS)
    model = load_model(base_of(tmp_path / "adapter"))
    load_adapter(model, tmp_path / "adapter")
    assert (model.eval()(IDS) - wanted).abs().max() <= 1e-4
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    assert (theirs(input_ids=IDS[None]).logits[0] - wanted).abs().max() <= 1e-4
    assert (logits(state, SIZES, IDS) - wanted).abs().max() > 0.1, "the update must be seen"
    config, named = read_adapter_config(tmp_path / "adapter")
    assert (config.r, config.alpha, config.targets, named) == (4, alpha, ["q_proj", "v_proj"], str(base))


def test_a_lora_knows_its_base(tmp_path: Path, base: Path) -> None:
    """Catches an adapter that is run on another model."""
    write_lora(tmp_path / "lora.pth")
    convert_lit_lora(tmp_path / "lora.pth", base, tmp_path / "adapter")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x02")
    with pytest.raises(IntegrityError, match=r"base/model\.safetensors is damaged"):
        base_of(tmp_path / "adapter")
    (base / "SHA256SUMS").unlink()
    with pytest.raises(IntegrityError, match="is not the base"):
        base_of(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.lora_B"), "1 missing"),
        (lambda tensors: tensors.update({"x": torch.ones(2)}), "1 unknown (x"),
        (
            lambda tensors: tensors.update({"transformer.h.1.attn.c_attn.lora_A": torch.ones(8, 128)}),
            "this base needs lora_A (2r, 256) and lora_B (512, r)",
        ),
        (lambda tensors: [value.zero_() for name, value in tensors.items() if name.endswith("B")], "never trained"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, base: Path, change: Any, message: str) -> None:
    """Catches an adapter of another size, a damaged one, and one that does nothing."""
    tensors = write_lora(tmp_path / "lora.pth")
    change(tensors)
    torch.save(tensors, tmp_path / "lora.pth")
    with pytest.raises(CheckpointError) as caught:
        convert_lit_lora(tmp_path / "lora.pth", base, tmp_path / "adapter")
    assert message in str(caught.value)
    assert nothing_left(tmp_path / "adapter")


def test_the_door_converts_a_lora(tmp_path: Path, base: Path) -> None:
    """Catches a flag that does not reach its function."""
    write_lora(tmp_path / "lora.pth")
    flags = ("--source", tmp_path / "lora.pth", "--destination_path", tmp_path / "adapter", "--base_dir", base)
    done = run_here("prepare/checkpoint.py", *flags, "--lora_alpha", 32)
    assert done.returncode == 0, done.stderr
    assert read_adapter_config(tmp_path / "adapter")[0].alpha == 32


def test_a_lora_without_its_base_is_explained(tmp_path: Path, lit_file: Path) -> None:
    """Catches a LoRA that is taken for a broken base model."""
    write_lora(lit_file)
    with pytest.raises(CheckpointError, match="is a LoRA of lit-llama: name the converted base model with --base_dir"):
        convert(lit_file, tmp_path / "made", rms_norm_eps=1e-5)
