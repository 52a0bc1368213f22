"""From records to token ids."""
