"""Serve a model and adapters of it over HTTP, as OpenAI's API has it.

python generate/serve.py --checkpoint_dir out/lora/NAME
python generate/serve.py --checkpoint_dir checkpoints/NAME --adapters poet=out/lora/poet sql=out/lora/sql
"""

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import Precision
from lit_llama.model.config import Held
from lit_llama.text.prompts import StyleName


def main(
    *,
    checkpoint_dir: Path,
    adapters: dict[str, Path] | None = None,
    base_dir: Path | None = None,
    conversations: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    prompt_style: StyleName | None = None,
    precision: Precision = "auto",
    quantize: Held | None = None,
    draft_dir: Path | None = None,
    plan: bool = False,
    plan_memory: str | None = None,
    batch_size: int = 32,
    max_waiting: int = 256,
    max_choices: int = 128,
    max_length: int | None = None,
    max_body: int = 16 << 20,
    max_seconds: float = 600.0,
    log_content: bool = False,
) -> None:
    """Answer requests until a signal comes; what was asked before it is still answered, unless a second one comes.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder. Requests that name no model are answered by it.
        adapters: Further adapters of its base, as NAME=DIR, which requests name as their model.
        base_dir: The base model of an adapter, where it is not found where the adapter says.
        conversations: Folder of the conversations that the page at / shows; left out, lit_llama/conversations among the
            user's data, which generate/chat.py shows, too.
        host: Address to listen at; other machines reach others than 127.0.0.1 only, and then a key is needed.
        port: To listen at; 0 for any that is free.
        api_key_file: Keys, one a line, of which requests have to carry one. LIT_LLAMA_API_KEY holds one as well.
        prompt_style: Ask in this style instead of the one the folder carries.
        precision: Of weights and activations; auto is bfloat16 where the hardware is fast at it.
        quantize: Hold the linear layers in 4 or 8 bits; left out, as they were held when the adapter was trained. On a
            CPU, int8 and int4 are the fast ones.
        draft_dir: A smaller checkpoint of the same tokenizer that guesses tokens: the same answers, sooner.
        plan: Say what memory the model needs and whether it fits, and load nothing.
        plan_memory: The same for another amount of memory, such as 16GB, in place of what is free here.
        batch_size: Answers made together.
        max_waiting: Answers that may wait for their turn; requests beyond are refused with 429.
        max_choices: Answers of one request.
        max_length: Tokens of a prompt with its answer; left out, what the model reads and the cache holds.
        max_body: Bytes of a request.
        max_seconds: That an answer may take.
        log_content: Write to the log what is asked and answered, too.
    """
    from lit_llama.generate.chat.store import Store, default_folder
    from lit_llama.generate.plan import print_plan
    from lit_llama.generate.serve.page.routes import page_routes
    from lit_llama.generate.serve.start import Settings, check_folders, start

    settings = Settings(
        host=host,
        port=port,
        api_key_file=api_key_file,
        batch_size=batch_size,
        max_waiting=max_waiting,
        max_choices=max_choices,
        max_length=max_length,
        max_body=max_body,
        max_seconds=max_seconds,
        log_content=log_content,
    )
    if plan or plan_memory is not None:
        folder = check_folders(checkpoint_dir, adapters or {}, prompt_style, base_dir, draft_dir)
        needed = folder.plan(precision=precision, quantize=quantize, max_sequences=batch_size, memory=plan_memory)
        print_plan(needed)
        return
    store = Store(conversations or default_folder())
    start(
        checkpoint_dir,
        adapters or {},
        settings,
        routes=lambda service: page_routes(service, store),
        base_dir=base_dir,
        prompt_style=prompt_style,
        precision=precision,
        quantize=quantize,
        draft_dir=draft_dir,
    )


if __name__ == "__main__":
    CLI(main)
