"""Prepare instruction data, fine-tune LLaMA-family models with LoRA, and generate with the result."""
