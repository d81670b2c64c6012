"""What a person reads of finished runs: tables, pictures, a page."""
