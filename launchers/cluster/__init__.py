"""How machines meet."""
