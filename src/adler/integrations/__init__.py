"""Ready-made descriptions for other libraries, none of which is imported here."""
