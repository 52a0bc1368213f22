"""The cost model: what links and collectives cost, and what a step sends."""
