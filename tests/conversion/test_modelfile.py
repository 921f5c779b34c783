"""Modelfiles of Ollama: their templates by hand, each checked once with Go's text/template against the style."""

from pathlib import Path
from typing import Any

import pytest
from conftest import run_here, tiny_model, write_tokenizer
from gguf_files import SHAPE, write_model

from lit_llama.conversion import convert
from lit_llama.conversion.gguf.modelfile import go_template, modelfile
from lit_llama.errors import UserError
from lit_llama.text.config import StyleName
from lit_llama.text.prompts.encode import named_style, style_of

TEMPLATES: dict[StyleName, str | None] = {
    "chatml": (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}'
        "{{ if $first }}{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}{{ $first = false }}{{ else }}<|im_start|>user\n{{ end }}"
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    ),
    "mistral": (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}'
        "{{ if $first }}[INST] {{ $first = false }}{{ else }}[INST] {{ end }}{{ .Content }} [/INST]"
        '{{ else if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}{{ end }}'
    ),
    "alpaca": (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $first }}'
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ $first = false }}{{ else }}\n\n### Instruction:\n{{ end }}{{ .Content }}\n\n### Response:"
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ end }}{{ end }}'
    ),
    "llama-2": None,  # a token that begins a text stands before each question, and Ollama puts one before all
}


@pytest.mark.parametrize(("name", "wanted"), TEMPLATES.items(), ids=TEMPLATES)
def test_a_built_in_style_is_translated(name: StyleName, wanted: str | None) -> None:
    """Catches a lead, an end or a break between turns that is lost, and an answer that is asked for otherwise."""
    assert go_template(named_style(name), "</s>") == wanted


def metadata(template: str | None) -> dict[str, Any]:
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 2}
    return {"tokenizer.ggml.tokens": ["a", "</s>", "<|im_end|>"], "tokenizer.chat_template": template} | ids


@pytest.mark.parametrize(
    ("template", "there", "absent"),
    [
        (named_style("chatml").jinja(bos=True), ['TEMPLATE """{{ $first', 'stop "<|im_start|>"'], "is not one of"),
        ("{{ messages }}", ["# No TEMPLATE: that of the file is not one of the built-in"], 'TEMPLATE """'),
        (None, ["# No TEMPLATE: the file has none"], 'TEMPLATE """'),
        (named_style("llama-3").jinja(bos=True), ["# Blanks around a message are kept"], "no system message"),
        (named_style("alpaca").jinja(bos=False), ["# It has no system message", "### Input:"], "Blanks"),
    ],
)
def test_a_modelfile_says_what_it_cannot_say(template: str | None, there: list[str], absent: str) -> None:
    """Catches a guess at a foreign template, and a difference that goes unsaid."""
    made = modelfile("my model.gguf", metadata(template))
    assert made.startswith("FROM ./my model.gguf\n") and made.count('PARAMETER stop "</s>"\n') == 1
    assert made.count('PARAMETER stop "<|im_end|>"\n') == 1
    assert all(text in made for text in there) and absent not in made
    assert template is None or go_template(style_of(template), "</s>") is None or "built-in" not in made


def test_the_doors_write_it_on_request(tmp_path: Path) -> None:
    """Catches a Modelfile that nobody asked for, one that is overwritten, and a flag that is ignored."""
    write_tokenizer(tmp_path)
    folder = write_model(tmp_path, tiny_model(**SHAPE), "float32")
    convert(folder, tmp_path / "plain.gguf", layout="gguf")
    assert not list(tmp_path.glob("*.Modelfile"))
    flags = [
        "--source",
        folder,
        "--format",
        "gguf",
        "--destination_path",
        tmp_path / "tiny.gguf",
        "--modelfile",
        "true",
    ]
    done = run_here("prepare/checkpoint.py", *flags)
    assert done.returncode == 0 and f"ollama create tiny -f {tmp_path}/tiny.Modelfile" in done.stderr
    assert (tmp_path / "tiny.Modelfile").read_text().startswith("FROM ./tiny.gguf\n")
    (tmp_path / "tiny.gguf").unlink()
    with pytest.raises(UserError, match=r"tiny\.Modelfile already exists"):
        convert(folder, tmp_path / "tiny.gguf", layout="gguf", modelfile=True)
    with pytest.raises(UserError, match="--modelfile is for a model with --format gguf"):
        convert(folder, tmp_path / "made", modelfile=True)
