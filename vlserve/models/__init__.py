"""Families of models: what the front and a rank must know of each, and how a checkpoint is found."""
