"""Definition of operators of torch.library, of which tensors without numbers and torch.compile know the schema.

`Library.define` and `impl` are used in place of `custom_op`, whose wrapper takes about 15 microseconds a call and these
2: a step calls operators some hundred times.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "lit_llama"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    schema: str,
    plain: Callable[..., Any] | None,
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make an operator and return what calls it.

    Args:
        schema: Its name and arguments, without the namespace; what it writes to is marked, as in `Tensor(a!) out`.
        plain: Computes on every device that has nothing of its own; None where there is no other.
        cpu: Computes on a CPU.
        cuda: Computes on a GPU.
        fake: Makes the results without their numbers; left out where there are none.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for function, key in ((plain, "CompositeExplicitAutograd"), (cpu, "CPU"), (cuda, "CUDA")):
        if function is not None:
            _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or _nothing, lib=_LIBRARY)
    called: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return called


def differentiate(name: str, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Give an operator its derivative.

    Args:
        name: The operator, without the namespace.
        backward: Called with the context and the gradients of the results; gives those of the arguments.
        keep: Called with the context, the arguments and the results, to keep what `backward` needs.
    """
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=keep, lib=_LIBRARY)


def _nothing(*arguments: object) -> None:
    """Stand in for an operator that only writes to its arguments."""
