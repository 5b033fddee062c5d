"""LoRA fine-tuning of a text classifier with Flower, as its quickstarts for transformers and LLMs do it."""
