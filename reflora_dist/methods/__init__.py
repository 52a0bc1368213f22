"""The methods: what a step does to the factors or their gradients, from Gram matrices alone. One file each.

No rank, no engine and no optimizer in here; reflora_dist/README.md tells how to add a method.
"""
