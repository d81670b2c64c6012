"""The base of all packages: argument checks, files, ranks, numerical precision."""
