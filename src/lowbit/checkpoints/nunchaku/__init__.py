"""nunchaku's single files."""
