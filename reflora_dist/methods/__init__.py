"""The methods, one file each: they compute from Gram matrices what a step does to the factors or their gradients.

Methods know no ranks, no engines and no optimizers. reflora_dist/README.md explains how to add a method.
"""
