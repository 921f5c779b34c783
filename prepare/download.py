"""Download a model or an adapter from the Hugging Face Hub into checkpoints/<name>/: only what is needed, checked.

python prepare/download.py --repo_id HuggingFaceTB/SmolLM2-135M-Instruct
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI


def main(
    *,
    repo_id: str,
    revision: str | None = None,
    destination_path: Path | None = None,
    file: str | None = None,
) -> None:
    """Download what a model folder needs. A run that was interrupted goes on where it stopped.

    Args:
        repo_id: OWNER/NAME, as in the address of the model's page.
        revision: A branch, tag or commit; left out, the main branch.
        destination_path: Folder to make; left out, checkpoints/NAME.
        file: A GGUF file of the repository, instead of the model folder; of a model in parts name the first, all come.
    """
    from lit_llama.conversion.download import download

    download(repo_id, destination_path, revision=revision, file=file)


if __name__ == "__main__":
    CLI(main)
