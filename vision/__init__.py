"""The vision side: pictures to tiles, tiles to features. Knows nothing of the language model or requests."""
