"""Names that templates and expressions use, found without running them."""

from lit_llama.errors import UserError

_GLOBALS = {"namespace", "dict", "raise_exception", "strftime_now", "range", "lipsum", "cycler", "joiner"}


def template_names(source: str, where: str) -> set[str]:
    """Return the names that a template reads and does not set itself.

    Raises:
        UserError: Its syntax is wrong.
    """
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return set(meta.find_undeclared_variables(environment.parse(source))) - _GLOBALS
    except TemplateError as error:
        raise UserError(f"{where}: the template is wrong: {error}") from error


def expression_names(source: str, where: str) -> set[str]:
    """Return the names that an expression reads.

    Raises:
        UserError: Its syntax is wrong.
    """
    return template_names(as_template(source), where)


def as_template(expression: str) -> str:
    """Return a template that writes the value of an expression as JSON."""
    return "{{ (" + expression + ") | tojson }}"
