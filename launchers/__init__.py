"""Programs that train with reflora_dist: fine-tuning, the embedded model and data, comparison tables."""
