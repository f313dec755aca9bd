"""Text from a model, converted or ordinary: batched, streamed, greedy or sampled."""

from mlakit.generation.generate import GenerationResult, generate, prompt_ids

__all__ = ["GenerationResult", "generate", "prompt_ids"]
