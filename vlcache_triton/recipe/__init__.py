"""The recipe: how many tokens each layer keeps of a prompt, and which (VL-Cache)."""
