"""Meta-learners of the library's own."""
