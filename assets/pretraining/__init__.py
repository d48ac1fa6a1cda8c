"""Pretraining of the tiny checkpoint: the model, the stages, and pages whose questions are worded unlike the sample data."""
