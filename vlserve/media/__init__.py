"""Bytes to pictures: named, fetched within bounds, decoded, preprocessed."""
