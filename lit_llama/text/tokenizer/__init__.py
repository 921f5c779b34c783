"""Tokenizers: text -> ids and back, whichever program's files they are read from.

Both kinds are imported here, so that `Tokenizer.from_path` knows them whichever file of the package is imported.
"""

from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import HubTokenizer, SentencePieceTokenizer

__all__ = ["HubTokenizer", "SentencePieceTokenizer", "Tokenizer"]
