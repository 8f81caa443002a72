"""Every use of a private part of another library."""
