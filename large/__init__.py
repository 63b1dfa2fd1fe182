"""What large images need beyond the method."""
