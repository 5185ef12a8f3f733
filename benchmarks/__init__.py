"""Tables that are made by hand and committed."""
