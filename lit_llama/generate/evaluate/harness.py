"""A model for EleutherAI's lm-evaluation-harness, by the name lit_llama.

python -m lit_llama.generate.evaluate.harness run --model lit_llama --model_args pretrained=FOLDER --tasks arc_easy

is the harness's own command, `lm_eval`, in which the model is known; from Python, importing this module is enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_llama.errors import UserError
from lit_llama.generate.answer import answer_requests
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.evaluate.likelihood import score
from lit_llama.generate.llm import load
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import Cutter, for_style, ids_of, rendered
from lit_llama.text.prompts.styles import Segment

try:
    import lm_eval.models  # noqa: F401 - the harness itself does so only where no model is registered yet
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is not there ({error}): pip install 'lit_llama[harness]'") from error

_MOST_TOKENS = 256
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_WITHOUT_EFFECT = ("num_beams", "use_cache", "pad_token_id", "eos_token_id")


@register_model("lit_llama")
class LitLLaMA(TemplateLM):  # type: ignore[misc]
    """A checkpoint or adapter folder behind the methods that the harness asks a model by.

    Args:
        pretrained: The folder.
        batch_size: Without effect: the engine batches what fits.
        max_batch_size: As batch_size.
        device: Without effect but a word, if it is another: the GPU counts where there is one, or the CPU.
        loading: Fields of `Loading`; `prompt_style` counts where the harness applies a chat template.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        llm = load(pretrained, **loading)
        if device is not None and str(device).partition(":")[0] != llm.device.type:
            stderr().print(f"device {device} is asked for; computed on {llm.device}")
        self.llm, self._name = replace(llm, opening=""), pretrained
        self._cutter = Cutter(llm.tokenizer)
        self._cut = 0

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.llm.config.context_length

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self.llm.tokenizer.control[self.llm.tokenizer.eos]

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text that has nothing before it."""
        bos = self.llm.tokenizer.control.get(self.llm.tokenizer.bos_token)
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name by which the harness tells its caches apart."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, in which spelled control tokens are such, as the harness's own models have it."""
        tokenizer = self.llm.tokenizer
        ids = ids_of(tokenizer, self._cutter.runs([Segment(string, template=True)]))
        bos = [tokenizer.control[tokenizer.bos]] if tokenizer.bos and add_special_tokens is not False else []
        return ids if bos == ids[:1] else bos + ids

    # ---- chats

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template, for the record of a run."""
        return self.llm.require_style().jinja(bos=False) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a chat, up to where the answer begins; or with its last message begun."""
        tokenizer, style = self.llm.tokenizer, self.llm.require_style()
        asked, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        told = rendered(for_style(tokenizer, style), style, asked, answer=True)
        return "".join(segment.text for segment in told.segments) + begun

    # ---- what is asked

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        texts = [self._fitting(context, wanted) for _, context, wanted in requests]
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(texts)), key=lambda number: texts[number][0])  # those that begin alike are neighbours

        def take(place: int, logprobs: list[float], greedy: list[bool]) -> None:
            found[order[place]] = sum(logprobs), all(greedy)

        score(self.llm, [texts[number] for number in order], take)
        answers = [found[number] for number in range(len(texts))]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:  # a whole text, and no window of one
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        self._tell_cut()
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Ids whose beginning is left out where they are too long, and where the continuation begins."""
        if len(continuation) >= self.max_length:
            raise UserError(f"a continuation has {len(continuation)} tokens, but the model reads {self.max_length}")
        ids = [*context, *continuation]
        self._cut += len(ids) > self.max_length
        ids = ids[-self.max_length :]
        return ids, len(ids) - len(continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in windows where they are longer than the model reads."""
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            sums.append(total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to the texts that end them."""
        asked = []
        for number, request in enumerate(requests):
            context, wanted = request.args
            sampling = sampling_of(wanted)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks is {sampling.max_new_tokens}, but the model reads {self.max_length} tokens"
                )
            prompt = self.tok_encode(context)
            self._cut += len(prompt) > room
            asked.append(self.llm.request(prompt[-room:], sampling, number=number))
        made = [answer for [answer] in answer_requests(self.llm, asked)]
        if failed := next((answer.error for answer in made if answer.error is not None), None):
            raise failed
        answers = [answer.text for answer in made]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        self._tell_cut()
        return answers

    def _tell_cut(self) -> None:
        """Say how many prompts lost their beginning, as the harness has it."""
        if self._cut:
            stderr().print(f"{self._cut} prompts lost their beginning: the model reads {self.max_length} tokens")
            self._cut = 0


def sampling_of(wanted: Mapping[str, Any]) -> Sampling:
    """Translate what a task of the harness asks for into a sampling.

    Raises:
        UserError: It asks for what is not done here.
    """
    given = dict(wanted)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    limit = next((given.pop(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in given), None)
    sampled = given.pop("do_sample", None)
    values = {key: given.pop(key) for key in _SAMPLED if given.get(key) is not None}
    if sampled is False:
        values.pop("temperature", None)
    elif sampled:
        values.setdefault("temperature", 1.0)
    seed = given.pop("seed", None)
    if unknown := [
        key for key, value in given.items() if value is not None and key not in (*_WITHOUT_EFFECT, *_SAMPLED)
    ]:
        raise UserError(f"the task asks for {', '.join(unknown)}, which is not done here")
    if (given.get("num_beams") or 1) != 1:
        raise UserError("the task asks for beams, which are not done here")
    values |= {} if seed is None else {"seed": seed}
    return Sampling(max_new_tokens=int(limit or _MOST_TOKENS), stop=[text for text in until if text], **values)


def main() -> None:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
