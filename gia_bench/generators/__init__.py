"""Networks that make images from latents: their training on public examples, and their loading for attacks."""
