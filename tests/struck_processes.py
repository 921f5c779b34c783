"""Run a script as one or several processes, of which one sends a signal ahead of a step.

python tests/struck_processes.py RANK STEP SIGNAL (launcher|itself) finetune/lora.py FLAGS
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from known_passes import keep

if __name__ == "__main__":
    rank, step, name, whom, script, *flags = sys.argv[1:]
    keep(pytest.MonkeyPatch())
    if os.environ.get("LOCAL_RANK", "0") == rank:
        from lit_llama.train.loop import Trainer

        whole = Trainer.step

        def struck(self: Trainer) -> dict[str, Any]:
            if self.progress.step == int(step):
                os.kill(os.getppid() if whom == "launcher" else os.getpid(), signal.Signals[name])
            return whole(self)

        Trainer.step = struck
    sys.argv = [script, *flags]
    runpy.run_path(str(Path(__file__).parent.parent / script), run_name="__main__")
