"""Run by test_preference_processes.py: two processes that take preference runs one after the other.

They meet once, as that takes as long as a run.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llama.train.distributed.launch import launch


def main(checkpoint: Path, folder: Path, settings: list[dict[str, Any]]) -> None:
    """Every setting into a folder of its name; one with `stopped` is ended after that step and continued."""
    import pytest
    from known_passes import keep
    from pair_data import prefer
    from small_runs import Killed, stop_after

    from lit_llama.train import run as run_module
    from lit_llama.train.distributed.processes import Processes, join

    with join(2, 1) as processes, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def joined(devices: object, num_nodes: object) -> Iterator[Processes]:
            yield processes

        patch.setattr(run_module, "join", joined)
        keep(patch)
        for setting in settings:
            name, data, stopped = (setting.pop(key) for key in ("name", "data", "stopped"))
            if stopped:
                with pytest.MonkeyPatch.context() as short, pytest.raises(Killed):
                    stop_after(short, stopped)
                    prefer(checkpoint, Path(data), folder / name, **setting)
                processes.wait()
            prefer(checkpoint, Path(data), folder / name, resume="auto", **setting)


if __name__ == "__main__":
    launch(2, 1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
