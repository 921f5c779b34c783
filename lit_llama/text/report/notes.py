"""What there is to say of rows that are kept, for people."""

from collections.abc import Mapping
from typing import Any

_WHAT = {
    "looks_rendered": "are texts that spell control tokens, which are trained as text; --rendered makes control tokens "
    "of them",
    "opened": "are trained behind what the chat template ends a prompt in, as generation asks for them; in a "
    "conversation it does not write that",
    "joined": "have an answer whose beginning the tokenizer would join to the end of its prompt; it is encoded apart, "
    "as generation meets it",
}
_LEFT_OUT = {
    "template": "are trained without their thoughts, which the chat template leaves out; --thoughts keep trains them",
    "keep": "are trained without their thoughts, although they were to be kept",
    "drop": "are trained without their thoughts, as asked",
}
_TYPED_ENDS = {
    "keep": "have an answer that ends in a spelled control token, which is trained as text: the model will write it "
    "before it stops; --typed_ends strip takes it away",
    "strip": "had an answer that ended in a spelled control token, which was taken away, as asked",
}
_ASKED = {"thoughts": "drop", "typed_ends": "strip"}


def noted(what: str, meta: Mapping[str, Any]) -> str:
    """The end of a sentence that begins with a number of rows."""
    if what == "thoughts_left_out":
        return _LEFT_OUT[meta["thoughts"]]
    return _TYPED_ENDS[meta["typed_ends"]] if what == "typed_ends" else _WHAT[what]


def grade(what: str, meta: Mapping[str, Any]) -> str:
    """How much a note asks for attention: "fix", "check" or "note"."""
    if what == "looks_rendered":
        return "fix"
    rule = {"thoughts_left_out": "thoughts", "typed_ends": "typed_ends"}.get(what)
    return "note" if rule is None or meta[rule] == _ASKED[rule] else "check"
