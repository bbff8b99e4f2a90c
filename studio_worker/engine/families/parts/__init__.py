"""What models are made of, and families share: components, their published names, how prompts are read."""
