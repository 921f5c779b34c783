"""The table of exit statuses."""

import re

from conftest import ROOT

from lit_llama import errors


def test_every_status_of_an_error_is_in_the_table() -> None:
    """Catches a kind of error whose status nobody can look up."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    used = {kind.exit_status for kind in kinds}
    listed = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "docs/commands.md").read_text("utf-8"), re.MULTILINE)))
    assert len(used) > 5 and used <= listed, used - listed
