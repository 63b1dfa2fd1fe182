"""Captions, and grids of embeddings drawn from them."""
