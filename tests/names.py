"""Names in the texts of the library: parameters and calls go through `lit_llama.wording`, and are really there.

`python tests/names.py lit_llama` prints a line for each flag or script in a text outside the side of the doors, each
text that is worded when its module is imported, and each name that nothing public has; `make lint` too.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOOR_SIDE = ("__main__.py", "cli.py", "commands.py", "flags.py", "habits.py", "wording.py")
"""Modules directly under lit_llama/ that may name flags and scripts, and what stands in their place."""
GROUPS = {"TrainConfig": "train.", "LoRAConfig": "lora.", "PreferenceConfig": "dpo."}
SETTINGS = {
    "prepare": ["PrepareConfig"],
    "finetune": ["RunConfig", *GROUPS],
    "load": ["Loading"],
    "add_delta": ["DeltaConfig"],
    "evaluate": ["Sampling", "Loading"],
    "generate_rows": ["Loading"],
}
"""Configurations whose fields a function takes as **settings."""
MARKS = {"finetune": {"config"}, "load": {"raw"}}
"""What a call tells a door beside the parameters of its function."""
CONFIGURATIONS = {*GROUPS, *(kind for kinds in SETTINGS.values() for kind in kinds)}

_FLAG = re.compile(r"(?<![\w-])--([a-zA-Z]\w*(?:\.\w+)*)")
_SCRIPT = re.compile(
    r"(?<![\w./-])(?:prepare|finetune|generate)/(?:[a-z]+|…)\.py\b|\blit-llama (?:prepare|finetune|generate)\b"
)
_FOREIGN = re.compile(r"(?:\bllama-cli|\bpython -m) .*")
"""Commands of other programs, up to the end of their line."""
_SIGN = "…"


class Fault(NamedTuple):
    """A text, or a name in one, that does not do."""

    line: int
    why: str


class Call(NamedTuple):
    """A call that a text names, as far as it is seen in the source."""

    line: int
    function: str
    arguments: tuple[str, ...]


@cache
def functions() -> Mapping[str, set[str]]:
    """Return the public functions of the package with their parameters, those of configurations included."""
    homes = [*(ROOT / "lit_llama" / "api").glob("*.py"), ROOT / "lit_llama" / "text" / "inspect" / "show.py"]
    exported = {name.value for name in _assigned("__all__").elts if isinstance(name, ast.Constant)}  # type: ignore[attr-defined]
    found = {
        node.name: {*_arguments(node), *(field for kind in SETTINGS.get(node.name, ()) for field in fields()[kind])}
        for path in homes
        for node in _parsed(path).body
        if isinstance(node, ast.FunctionDef) and node.name in exported
    }
    return {**found, "text.pipeline.alpaca.prepare_alpaca": set()}


@cache
def fields() -> Mapping[str, set[str]]:
    """Return the fields of the configurations, those of groups as train.epochs."""
    return {
        node.name: {
            GROUPS.get(node.name, "") + entry.target.id
            for entry in node.body
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
        }
        for path in (ROOT / "lit_llama").rglob("*.py")
        if re.search(rf"(?m)^class (?:{'|'.join(CONFIGURATIONS)})\b", path.read_text("utf-8"))
        for node in _parsed(path).body
        if isinstance(node, ast.ClassDef) and node.name in CONFIGURATIONS
    }


@cache
def parameters() -> frozenset[str]:
    """Return all that a function, a configuration or a door of this package takes."""
    doors = [path for stage in ("prepare", "finetune", "generate") for path in (ROOT / stage).glob("[a-z]*.py")]
    named = [argument for path in doors for node in _parsed(path).body for argument in _arguments(node)]
    return frozenset().union(named, *functions().values(), *fields().values())


def faults(source: str) -> Iterator[Fault]:
    """Yield the faults of a module, from top to bottom of each kind."""
    tree = ast.parse(source)
    for node, text in _texts(tree):
        if "/" not in text and "--" not in text and "lit-llama" not in text:
            continue
        if found := _SCRIPT.search(text):
            yield Fault(node.lineno, f"names the script {found[0]!r}; `call` names what helps")
        for name in _FLAG.findall(_FOREIGN.sub("", text)):
            if name in parameters() or name in ("help", "config", "as", "num_samples"):
                yield Fault(node.lineno, f"names the flag --{name}; `param` names a parameter")
    for line, name in _named(tree):
        if name not in parameters():
            yield Fault(line, f"names the parameter {name!r}, which nothing public has")
    for found_call in calls(source, tree):
        known = functions().get(found_call.function)
        if known is None:
            yield Fault(found_call.line, f"names lit_llama.{found_call.function}, which is no public function")
            continue
        for name in found_call.arguments:
            if name not in known | {"inline"} | MARKS.get(found_call.function, set()):
                yield Fault(
                    found_call.line, f"calls lit_llama.{found_call.function} with {name!r}, which it does not take"
                )
    for node in _at_import(tree):
        if isinstance(node, ast.Call) and _is_wording(node):
            yield Fault(node.lineno, "words a text when the module is imported, before anybody has called")


def calls(source: str, tree: ast.Module | None = None) -> Iterator[Call]:
    """Yield the calls that the texts of a module name."""
    if "lit_llama.wording" not in source:  # another function of this name
        return
    for node in ast.walk(tree or ast.parse(source)):
        if isinstance(node, ast.Call) and _called(node) == "call":
            function = node.args[0] if node.args else None
            if isinstance(function, ast.Constant) and isinstance(function.value, str):
                yield Call(node.lineno, function.value, tuple(word.arg for word in node.keywords if word.arg))


def _named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Parameters that texts and errors name, where they are constants."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = node.args[:1] if _called(node) == "param" else []
        named += [word.value for word in node.keywords if word.arg == "parameter" and _called(node).endswith("Error")]
        for name in named:
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.lineno, name.value
        if _called(node) == "params":
            yield from ((node.lineno, word.arg) for word in node.keywords if word.arg)


def _texts(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Strings; what is put into a formatted one stands there as a sign."""
    parts = set()
    for node in ast.walk(tree):  # outer ones first
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            yield node, "".join(str(part.value) if isinstance(part, ast.Constant) else _SIGN for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node, node.value


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when a module is imported."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            left += ast.iter_child_nodes(node)


def _is_wording(node: ast.Call) -> bool:
    return _called(node) in ("call", "param", "params") and bool(node.args or node.keywords)


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _arguments(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef):
        return []
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _assigned(name: str) -> ast.expr:
    """What the package assigns to a name."""
    for node in _parsed(ROOT / "lit_llama" / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise LookupError(name)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def library(folder: Path) -> list[Path]:
    """Return the modules below a folder that are not on the side of the doors."""
    return [path for path in sorted(folder.rglob("*.py")) if path.parent != folder or path.name not in DOOR_SIDE]


def main(*folders: str) -> int:
    """Print the faults below the folders, and return how many there are."""
    count = 0
    for path in [path for folder in folders for path in library(Path(folder))]:
        for fault in faults(path.read_text("utf-8")):
            print(f"{path}:{fault.line}: {fault.why}")
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
