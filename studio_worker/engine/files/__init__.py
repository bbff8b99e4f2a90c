"""Weights files: what their headers say, and their tensors, whichever of the published forms they have.

Owns safetensors and GGUF and the matrices that stay packed; knows no model.
"""
