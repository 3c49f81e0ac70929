"""One rendered conversation: which token belongs to which turn, and what it weighs by its turn."""
