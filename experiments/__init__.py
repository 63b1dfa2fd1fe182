"""Every table and picture of docs/."""
