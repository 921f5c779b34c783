"""Virtual environments of the peers, made when first asked for."""

import json
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llama.errors import ResourceError

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"
READY_FILE = "ready.json"


@dataclass(frozen=True)
class Packages:
    """What pip installs.

    Attributes:
        whole: With everything they need.
        alone: Without, as their lists name older versions than run well here; what they need is among `whole`.
    """

    whole: tuple[str, ...]
    alone: tuple[str, ...] = ()


PEERS = {
    "trl": Packages(("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0")),
    "litgpt": Packages(
        (
            "torch==2.13.0",
            "lightning==2.6.6",
            "jsonargparse[signatures]",
            "tokenizers",
            "safetensors",
            "pyyaml",
            "psutil",
        ),
        ("litgpt==0.5.13",),
    ),
}


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment below `folder`.

    Raises:
        ResourceError: pip cannot install a package; the message ends with its last line.
    """
    home, packages = folder.resolve() / peer, PEERS[peer]
    python, ready = home / "bin" / "python", home / READY_FILE
    wanted = json.dumps(asdict(packages))
    if ready.is_file() and ready.read_text("utf-8") == wanted:
        return python
    print(f"making the environment {home}; this takes minutes once", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    _pip(python, "-c", str(CONSTRAINTS), *packages.whole)
    if packages.alone:
        _pip(python, "--no-deps", *packages.alone)
    ready.write_text(wanted, "utf-8")
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ResourceError(f"{python.parent.parent}: pip cannot install {' '.join(arguments)}: {lines[-1]}")
