"""A model at work: components put together, prompts encoded, noise taken away, the picture decoded."""
