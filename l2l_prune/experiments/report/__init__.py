"""Reports on finished runs: tables, figures, a page."""
