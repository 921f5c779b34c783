"""lm-evaluation-harness against a server, without a line of code between them."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS
from servers import listening, service, tiny

from lit_llama.generate.answer import raw_ids
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.serve.app import create_app

pytestmark = pytest.mark.timeout(280)
CHOICES = ["{{q}}", " is a city.", " the response that completes the request.", " café 0123"]
TASKS: dict[str, dict[str, Any]] = {
    "pick": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 0},
    "write": {
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def score(llm: LLM, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether greedy decoding would write it."""
    request = Request([*prompt, *continuation], Sampling(max_new_tokens=0), prompt_logprobs=1)
    (step,) = llm.engine.stream(request)
    scores = step.prompt_logprobs[len(prompt) :]
    greedy = all(part.top[0][0] == token for part, token in zip(scores, continuation, strict=True) if part)
    return sum(part.logprob for part in scores if part), greedy


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])


def test_two_tasks_of_the_harness(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches: scores that are shifted by one, an echo that is left out, an answer that goes to another row."""
    program = shutil.which("lm_eval")
    if program is None:
        pytest.skip("lm_eval is not installed: pip install 'lm_eval[api]', in an environment of its own")
    rows = [{"text": CORPUS[i % 3][: 12 + 5 * i].strip(), "choices": CHOICES[1:], "q": "x"} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
        body = {"task": name, "test_split": "test", "doc_to_text": "{{text}}", **files, **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(body))
    own = load(tiny_folder)
    with listening(create_app(service(tiny_folder))) as address:
        model = f"model=tiny,base_url={address}/v1/completions,num_concurrent=3,max_length=256"
        command = [program, "--model", "local-completions", "--model_args", model, "--tasks", ",".join(TASKS)]
        command += ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "2"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        environment.pop("PYTHONPATH", None)
        environment |= {"HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    for row in samples(tmp_path / "out", "pick"):
        prompt = raw_ids(own, row["doc"]["text"], False)
        for choice, found in zip(row["doc"]["choices"], row["resps"], strict=True):
            whole = raw_ids(own, row["doc"]["text"] + " " + choice, False)  # the harness puts a blank between
            value, greedy = found[0]
            wanted = score(own, whole[: len(prompt)], whole[len(prompt) :])
            assert float(value) == pytest.approx(wanted[0], abs=1e-4) and (greedy in (True, "True")) == wanted[1]
    for row in samples(tmp_path / "out", "write"):
        sampling = Sampling(max_new_tokens=12, stop=["e", "\n\n"])
        stream = own.stream(raw_ids(own, row["doc"]["text"], False), sampling)
        assert row["resps"][0][0] == "".join(text for _, text in stream)
    assert tiny(tiny_folder)[0].engine.statistics().running == 0
