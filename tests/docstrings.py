"""First lines of docstrings: a verb for functions, a noun of the field for properties, classes and modules.

`python tests/docstrings.py lit_llama` prints a line for each public docstring that begins otherwise; `make lint` too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The base forms that first lines begin with. A verb that is missing here is added; a noun that is a verb, too, such as
# Text or Size, is not, lest a noun phrase passes for an order.
_VERBS = """
Abort Account Add Advise Align Allocate Answer Append Apply Ask Assert Attend Be Begin Bring Build Call Carry Change
Check Choose Close Compare Compile Complete Compute Constrain Continue Convert Copy Count Create Cut Deal Decide
Decode Delete Dequantize Describe Divide Do Download Draw Drop Emit Encode End Escape Estimate Evaluate Expand
Explain Export Fill Find Fine-tune Finish Fit Follow Forget Format Forward Free Freeze Gather Get Give Go Grade
Group Guess Hand Handle Hash Have Hold Ignore Import Index Interleave Invert Iterate Join Judge Keep Know Lay Leave
Let List Load Locate Look Make Match Measure Merge Move Multiply Name Normalize Note Notify Open Pack Pair Parse
Plan Print Publish Put Quantise Quantize Queue Raise Read Rebuild Record Refuse Remark Remember Remove Render
Reorder Replace Report Reset Resolve Restore Retry Return Rotate Round Run Save Say Scan Score Search Seed Serve Set
Show Shuffle Skip Smooth Sort Spell Split Start Step Stop Stream Submit Suggest Sum Summarise Take Tell Test Train
Translate Trim Try Turn Update Use Validate Verify Wait Warn Work Wrap Write Yield
"""
VERBS = frozenset(_VERBS.split())

# Words that begin a clause, or stand for the thing that the line ought to name.
_OPENERS = """
As By For Here How If In Into It Its Like Of See So Such That There These They This Those Up What Whatever When
Where Whether Which Who Whoever Whose Why With
"""
CLAUSES = frozenset(_OPENERS.split())

# Third persons that are plurals of nouns as well.
_PLURALS = """
Answers Bounds Calls Checks Claims Copies Counts Cuts Draws Edits Filters Groups Guesses Hashes Labels Limits Links
Lists Marks Matches Measures Moves Names Notes Orders Pairs Places Plans Records Reports Runs Scales Scores Seeds
Sets Splits States Steps Stops Streams Sums Tests Turns Updates Waits Works
"""
PLURALS = frozenset(_PLURALS.split())


class Fault(NamedTuple):
    """A docstring whose first line breaks the rule."""

    line: int
    name: str
    why: str


def faults(source: str) -> Iterator[Fault]:
    """Yield the faults of a module, from top to bottom."""
    yield from _faults(ast.parse(source), "")


def _faults(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Fault]:
    text = ast.get_docstring(node)
    if text and (why := _why(node, text)):
        yield Fault(node.body[0].lineno, name or "the module", why)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # functions within functions are nobody's interface
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
            yield from _faults(inner, f"{name}.{inner.name}".lstrip("."))


def _why(node: ast.AST, text: str) -> str:
    """Tell in words which part of the rule a docstring breaks; "" if none."""
    words = re.findall(r"[\w-]+", text.partition("\n")[0])
    first = words[0] if text[:1].isalnum() and words else text.split()[0]
    of_truth = first == "Whether" and _is_bool(node)
    if not of_truth and (first in CLAUSES or [word.lower() for word in words[:2]] == ["the", "same"]):
        return f"begins with '{' '.join(words[:2])}', which does not name its subject"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node) and not of_truth:
        if first not in VERBS:
            return f"begins with '{first}', where a verb belongs, one of those in tests/docstrings.py"
        if words[1:2] == ["of"] and first != "Say":
            return f"begins with '{first} of', which is a noun where a verb belongs"
    elif first in {"Return", "Get"} or (_is_third_person(first) and first not in PLURALS):
        return f"begins with '{first}', where a noun belongs"
    return ""


def _is_third_person(word: str) -> bool:
    bases = {word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)} - {word}
    return not bases.isdisjoint(VERBS)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_bool(node: ast.AST) -> bool:
    """Tell whether a function or property answers yes or no."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.returns is None:
        return False
    return ast.unparse(node.returns).startswith(("bool", "TypeGuard", "TypeIs"))


def main(*folders: str) -> int:
    """Print the faults below the folders, and return how many there are."""
    count = 0
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.py")):
        for fault in faults(path.read_text("utf-8")):
            print(f"{path}:{fault.line}: {fault.name}: the docstring {fault.why}")
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
