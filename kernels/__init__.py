"""The operations that decide speed, one a file: a torch definition (`op_ref`) beside the form that runs (`op`).

This package knows torch and nothing of models, requests or checkpoints.
"""
