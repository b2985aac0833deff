"""Data, training, evaluation, set-up and the pipeline: everything that makes an adapter."""
