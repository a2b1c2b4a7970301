"""Pruned federated learning: which weights a model keeps, and how that changes while it is trained."""
