"""Files as people have them, and what each of them gives (`files.CASES`)."""
