"""What all floors stand on: checks of what a user gives, whole files, ranks, numbers."""
