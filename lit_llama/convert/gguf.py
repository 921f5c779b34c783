"""GGUF (llama.cpp's single-file format) -> a Hugging Face folder: weights, configuration, tokenizer, chat template.

Layout and metadata keys: the GGUF specification of ggml. Dequantisation is the gguf package's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lit_llama.convert.bpe import adds_bos, tokenizer_json
from lit_llama.convert.rotary import halves_from_pairs
from lit_llama.convert.source import NAMES, Source
from lit_llama.errors import CheckpointError
from lit_llama.folder import encode_json
from lit_llama.model.config import LLaMAConfig

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MAGIC = b"GGUF"


class GGUFFile:
    """Metadata and tensors of a GGUF file, mapped.

    Raises:
        CheckpointError: It is no readable GGUF file of a LLaMA model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(64)
        if start[:4] != _MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it starts with {start[:16]!r}, expected {_MAGIC!r}")
        with self._explained("cannot be read"):
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: general.architecture is {architecture!r}, only 'llama' is implemented")
        self.tensors = {self._native_name(tensor.name): tensor for tensor in reader.tensors}

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """The package raises whatever its parsing runs into; a user is told which file."""
        try:
            yield
        except CheckpointError as error:
            raise error if str(self.path) in str(error) else CheckpointError(f"{self.path}: {error}") from error
        except OSError:  # a full disk is not the file's fault
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path} {what}: {type(error).__name__}: {error}") from error

    def _native_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in _INNER:
            return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{kind}"
        raise CheckpointError(f"{self.path}: tensor {name} has no place in a LLaMA model")

    def config(self) -> LLaMAConfig:
        """The shape of the model, from `llama.*` and the special ids.

        Raises:
            CheckpointError: Something is missing, or asks for mathematics this model does not compute.
        """
        if "model.embed_tokens.weight" not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        heads = self._get("llama.attention.head_count")
        hidden = self._get("llama.embedding_length")
        head_dim = self.metadata.get("llama.attention.key_length", hidden // heads)
        for key, only in {"llama.rope.scaling.type": "none", "llama.rope.dimension_count": head_dim}.items():
            if self.metadata.get(key, only) != only:
                raise CheckpointError(f"{self.path}: {key} is {self.metadata[key]!r}, only {only!r} is implemented")
        return LLaMAConfig(
            vocab_size=int(self.tensors["model.embed_tokens.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=self._get("llama.feed_forward_length"),
            num_hidden_layers=self._get("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self.metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._get("llama.context_length"),
            rms_norm_eps=_shortest(self._get("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(self.metadata.get("llama.rope.freq_base", 10000.0)),
            tie_word_embeddings="lm_head.weight" not in self.tensors,
            bos_token_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=(self._get("tokenizer.ggml.eos_token_id"),),
            pad_token_id=self.metadata.get("tokenizer.ggml.padding_token_id"),
        )

    def _get(self, key: str) -> Any:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the metadata has no {key}")
        return self.metadata[key]

    def tensor(self, name: str, config: LLaMAConfig, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised in float32, its rotary rows in Hugging Face's order, rounded once to `dtype`.

        Raises:
            CheckpointError: A value is not finite.
        """
        source = self.tensors[name]
        with self._explained(f"cannot be dequantised: {source.name}"):
            array = np.array(gguf.quants.dequantize(source.data, source.tensor_type), dtype=np.float32)
        value = torch.from_numpy(array).to(dtype)
        if not value.isfinite().all():
            raise CheckpointError(f"{self.path}: {source.name} has values that are not finite in {str(dtype)[6:]}")
        if name.endswith("q_proj.weight"):
            value = halves_from_pairs(value, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            value = halves_from_pairs(value, config.num_key_value_heads)
        return value


def _shortest(value: float) -> float:
    """GGUF holds float32; 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def open_gguf(path: Path, dtype: str | None = None) -> Source:
    """The model in a GGUF file.

    Args:
        path: The .gguf file.
        dtype: Quantised weights are rounded to it once: bfloat16 (also for None), float16 or float32.

    Raises:
        CheckpointError: It is no readable GGUF file, or of a model that is not implemented.
    """
    file = GGUFFile(path)
    with file._explained("has metadata that cannot be used"):
        config = file.config()
    target: torch.dtype = getattr(torch, dtype or "bfloat16")
    specs = {name: (NAMES[target], tuple(int(n) for n in tensor.shape[::-1])) for name, tensor in file.tensors.items()}
    with file._explained("has a tokenizer that cannot be rebuilt"):
        files = _tokenizer_files(file, config)
    raw = config.to_dict(str(target).removeprefix("torch."))
    return Source(
        path=path,
        kind="GGUF",
        config=raw,
        specs=specs,
        read=lambda name: file.tensor(name, config, target),
        files=files,
    )


def _tokenizer_files(file: GGUFFile, config: LLaMAConfig) -> dict[str, bytes]:
    metadata = file.metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if len(tokens) > config.vocab_size:
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens, but only {config.vocab_size} rows in the embedding")
    files = {"tokenizer.json": encode_json(tokenizer_json(metadata))}
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in special.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            settings[f"{name}_token"] = tokens[token_id]
    settings["add_bos_token"] = adds_bos(metadata)
    settings["clean_up_tokenization_spaces"] = False
    settings["model_max_length"] = config.max_position_embeddings
    files["tokenizer_config.json"] = encode_json(settings)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_id)}
    files["generation_config.json"] = encode_json(ids | {"pad_token_id": config.pad_token_id})
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files
