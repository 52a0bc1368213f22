"""Reports as Markdown and plots, one module per benchmark: ``markdown(record)`` and ``plot(record)``."""
