"""`vlserve convert`: InternVL from OpenGVLab's own format to transformers', and back, with the same weights.

`run.py` is the way from folder to folder; `tensors.py`, `settings.py` and `companions.py` say what becomes of weights, of
config.json and of the files beside them.
"""
