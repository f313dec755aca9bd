"""The OpenAI-compatible server: HTTP in, tokens of the engine out."""
