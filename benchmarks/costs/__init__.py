"""Parts of the cost model: speeds of links, costs of collectives, and the bytes of a step."""
