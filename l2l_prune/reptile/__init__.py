"""reptile."""
