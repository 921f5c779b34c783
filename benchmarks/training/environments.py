"""Virtual environments of the peers, made when first asked for."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
        environment: Variables of what is compiled.
    """

    whole: tuple[str, ...]
    alone: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def _flags() -> list[str]:
    """Instructions of this processor, where the kernel tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii").splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_flags())


def _instructions() -> str:
    """CMake's options of ggml for this processor: what it finds out alone where it is built for the machine at hand."""
    if not (flags := _flags()):
        return ""
    known = {
        **{name: name.upper() for name in ("avx2", "fma", "f16c", "bmi2")},
        **{"avx512f": "AVX512", "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI"},
        # Not AMX_INT8: llama.cpp's products of 8-bit tiles end the process on some processors that have them.
        **{"avx512_bf16": "AVX512_BF16", "amx_tile": "AMX_TILE", "amx_bf16": "AMX_BF16"},
    }
    found = [f"-DGGML_{option}=ON" for name, option in known.items() if name in flags]
    return " ".join(["-DGGML_NATIVE=OFF", *found])


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
    "llama-cpp-python": Packages(("llama-cpp-python==0.3.36",), environment={"CMAKE_ARGS": _instructions()}),
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
    _pip(python, "-c", str(CONSTRAINTS), *packages.whole, environment=packages.environment)
    if packages.alone:
        _pip(python, "--no-deps", *packages.alone, environment=packages.environment)
    ready.write_text(wanted, "utf-8")
    return python


def _pip(python: Path, *arguments: str, environment: Mapping[str, str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ResourceError(f"{python.parent.parent}: pip cannot install {' '.join(arguments)}: {lines[-1]}")
