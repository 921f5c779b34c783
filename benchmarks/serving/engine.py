"""Requests to an engine without HTTP, for what the server adds."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.load import Seen
from lit_llama.device import cores, peak_memory
from lit_llama.errors import ResourceError

ROOT = Path(__file__).parent.parent.parent


def drive_engine(checkpoint_dir: Path, texts: Sequence[str], tokens: int, clients: int) -> tuple[Seen, int]:
    """As `load.drive`, in a process of its own; and its peak memory.

    Raises:
        ResourceError: It failed.
    """
    asked = json.dumps({"folder": str(checkpoint_dir), "texts": list(texts), "tokens": tokens, "clients": clients})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.engine"], input=asked, text=True, cwd=ROOT, stdout=-1
    )
    if done.returncode:
        raise ResourceError("the engine failed, see above")
    found = json.loads(done.stdout)
    return Seen(**found["seen"]), found["peak"]


def main() -> None:
    """Answer what stdin asks for."""
    import torch

    from lit_llama.generate.answer import raw_ids
    from lit_llama.generate.engine.request import Sampling
    from lit_llama.generate.engine.worker import EngineThread
    from lit_llama.generate.llm import load

    asked = json.load(sys.stdin)
    torch.set_num_threads(cores())
    llm = load(asked["folder"])
    seen, left, lock = Seen(), list(enumerate(asked["texts"]))[::-1], threading.Lock()
    with EngineThread(llm.engine) as worker:

        def ask(text: str, tokens: int) -> None:
            sampling = Sampling(max_new_tokens=tokens)
            start = before = time.monotonic()
            ids = raw_ids(llm, text, False)
            shown, made = llm.text_behind(ids, sampling), 0
            for step in worker.submit(llm.request(ids, sampling)):
                if not shown.take(step):
                    continue
                now = time.monotonic()
                with lock:
                    seen.between.append(now - before) if made else seen.first.append(now - start)
                made, before = made + 1, now
            with lock:
                seen.tokens, seen.requests = seen.tokens + tokens, seen.requests + 1

        def client() -> None:
            while left:
                number, text = left.pop()
                ask(text, asked["tokens"] // 2 + number * 7 % asked["tokens"])

        ask("Once upon a time", 8)
        seen = Seen()
        threads = [threading.Thread(target=client) for _ in range(asked["clients"])]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen.seconds = time.monotonic() - start
    print(json.dumps({"seen": vars(seen), "peak": peak_memory(llm.device)}))


if __name__ == "__main__":
    main()
