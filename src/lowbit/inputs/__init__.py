"""What a request holds."""
