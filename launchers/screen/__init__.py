"""What a run shows: our own lines, and the libraries' lines that say something."""
