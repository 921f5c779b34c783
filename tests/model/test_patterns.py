"""Regular expressions of foreign adapters."""

import re
from typing import Any

import pytest
from conftest import tiny_model
from torch import nn

from lit_llama.errors import CheckpointError, UserError
from lit_llama.model import patterns
from lit_llama.model.adapters.lora import apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.patterns import check_pattern, matches_start, matches_whole

NAMES = [name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
PATTERNS = [
    *(
        "q_proj",
        "layers.0.mlp.up_proj",
        r"(?:.*\.)?(?:q_proj|v_proj)",
        r"(?:.*\.)?(?:model\.layers\.\d\.mlp\.(up|down)_proj)",
    ),
    *(r".*(q|v)_proj$", r"^(?!.*layers\.0).*(?:q_proj|v_proj)$", r"model\.layers\.[\d]{1,}\.self_attn\.(q|k)_proj"),
    r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\blm_head)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_python_does(pattern: str) -> None:
    """Catches another meaning in the process of its own, as of an engine without look ahead; the oracle is `re`."""
    for name in NAMES:
        assert matches_whole(pattern, name) is (re.fullmatch(pattern, name) is not None)
        assert matches_start(pattern, name) is (re.match(pattern, name) is not None)


def test_names_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tenth of a second for each adapter that names modules, as nearly all do."""
    monkeypatch.setattr(patterns, "_process", lambda: pytest.fail("asked"))
    for pattern in PATTERNS[:4]:
        assert any(matches_whole(pattern, f"x.{name}") for name in NAMES) or not pattern.startswith("(")


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """Catches an adapter that takes a core for ever; what comes after it is answered by a new process."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    hostile: dict[str, Any] = {setting: {r"(?:[a-z_.0-9]+)+!": 2}}
    with pytest.raises(
        CheckpointError, match=r"'\(\?:\.\*.*does not find out within 0\.2 s whether it means 'model\.lay"
    ):
        apply_lora(tiny_model(), LoRAConfig(r=2, **hostile))
    assert matches_whole(r"(?:a+)+", "aaa")


def test_what_is_no_pattern_is_told() -> None:
    """Catches a traceback of the parser."""
    for pattern in ("(", "a{9999999999999}", "a" * 10_001):
        with pytest.raises(ValueError):
            check_pattern(pattern)
    with pytest.raises(UserError, match=r"--lora\.rank_pattern: '\[' is no regular expression"):
        LoRAConfig(rank_pattern={"[": 2})
