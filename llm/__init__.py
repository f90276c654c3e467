"""The language model: a Llama-shaped decoder with a paged KV cache. Knows nothing of pictures or requests."""
