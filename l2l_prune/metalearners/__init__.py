"""metalearners."""
