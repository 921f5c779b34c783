"""Print docs/coming-from.md, which is made of the table that the scripts answer from.

python docs/coming_from.py > docs/coming-from.md
"""

from lit_llama.cli import CLI
from lit_llama.habits import page


def main() -> None:
    """Print the page."""
    print(page(), end="")


if __name__ == "__main__":
    CLI(main)
