"""Adapters to other libraries; each module imports only its own host."""
