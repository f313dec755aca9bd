"""What was measured, as data (schema), as a terminal table, as pictures and as one HTML page."""
