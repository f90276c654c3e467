"""`vlserve quantize`: a checkpoint's decoder in 4 or 8 bits, calibrated on pictures and text, one layer at a time.

`run.py` is the run from start to end; `layer.py` decides how one layer's weights are rounded; the rest is what they need.
"""
