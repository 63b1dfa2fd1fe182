"""The weights that come with the repository, and what reads and writes them."""
