"""Serve a model and adapters of it over HTTP, as OpenAI's API has it.

python generate/serve.py --checkpoint_dir out/lora/NAME
python generate/serve.py --checkpoint_dir checkpoints/NAME --adapters poet=out/lora/poet sql=out/lora/sql
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.generate.engine.request import Overflow
from lit_llama.generate.flags import Loading, loading_flags


@loading_flags()
def main(
    *,
    checkpoint_dir: Path,
    adapters: dict[str, Path] | None = None,
    conversations: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    loading: Loading,
    max_waiting: int = 256,
    max_choices: int = 128,
    max_length: int | None = None,
    max_body: int = 16 << 20,
    max_seconds: float = 600.0,
    overflow: Overflow = "error",
    log_content: bool = False,
) -> None:
    """Answer requests until a signal comes; what was asked before it is still answered, unless a second one comes.

    Args:
        checkpoint_dir: A checkpoint folder or an adapter folder. Requests that name no model are answered by it.
        adapters: Further adapters of its base, as NAME=DIR, which requests name as their model.
        conversations: Folder of the conversations that the page at / shows; left out, lit_llama/conversations among the
            user's data, which generate/chat.py shows, too.
        host: Address to listen at; other machines reach others than 127.0.0.1 only, and then a key is needed.
        port: To listen at; 0 for any that is free.
        api_key_file: Keys, one a line, of which requests have to carry one. LIT_LLAMA_API_KEY holds one as well.
        loading: How models are loaded.
        max_waiting: Answers that may wait for their turn; requests beyond are refused with 429.
        max_choices: Answers of one request.
        max_length: Tokens of a prompt with its answer; left out, what the model reads and the cache holds.
        max_body: Bytes of a request.
        max_seconds: That an answer may take.
        overflow: Beyond what the model reads: error refuses a request; drop_oldest leaves out the oldest turns of a
            conversation or tokens of a text, whose number is in the header X-Dropped of the reply, and has an answer
            that becomes too long go on behind the later half.
        log_content: Write to the log what is asked and answered, too.
    """
    from lit_llama.generate.chat.lines import default_folder
    from lit_llama.generate.chat.store import Store
    from lit_llama.generate.plan import print_plan
    from lit_llama.generate.serve.page.routes import page_routes
    from lit_llama.generate.serve.server import Settings, check_folders, start

    settings = Settings(
        host=host,
        port=port,
        api_key_file=api_key_file,
        max_waiting=max_waiting,
        max_choices=max_choices,
        max_length=max_length,
        max_body=max_body,
        max_seconds=max_seconds,
        log_content=log_content,
        overflow=overflow,
    )
    if loading.only_planned:
        print_plan(check_folders(checkpoint_dir, adapters or {}, loading).plan())
        return
    store = Store(conversations or default_folder())
    start(
        checkpoint_dir,
        adapters or {},
        settings,
        loading,
        routes=lambda service: page_routes(service, store),
    )


if __name__ == "__main__":
    CLI(main)
