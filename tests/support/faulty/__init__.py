"""faulty."""
