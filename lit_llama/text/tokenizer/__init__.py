"""Tokenizers: text -> ids and back, whichever program's files they are read from."""

from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import HubTokenizer, SentencePieceTokenizer

__all__ = ["HubTokenizer", "SentencePieceTokenizer", "Tokenizer"]
