"""What a rank runs: scheduling, batches, sampling. Knows nothing of HTTP, text or picture files."""
