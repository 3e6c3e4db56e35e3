"""The six steps of a sleep over facts: health, curate, audit, maintain, validate, report."""
