"""Which lines of a run's output are neither ours nor results, such as a library's warnings."""

from __future__ import annotations

import re

# the beginnings of lines that say something to a user
_OURS = re.compile(
    "|".join(
        (
            r"(\w+\.py|reflora-\w+): |smollm2: ",  # say, show, and their like
            r"removed a lock that |DeepSpeed will wait for the build ",  # of another run on this machine
            r"starting \d+ process\(es\) with ",
            r"Looking in |ERROR: (Could not find|No matching)",  # pip's, where the wheel of SmolLM2 cannot be had
            r"===|python [\d.]+ at |records |held out |model |ready after|bytes: |plot: |Q: |A: |   [\w. -]+  ",
            r"Pre-training a LLaMA",
            r"attached \w|step \d+: refactored",
            r"[\w-]+: \d+ steps, |adapter   |plot      |adapter: |merged model: |results |settings  ",
            r"\{'\w+': ",  # Trainer's figures
            r".*[┏┃┡│├└━]|\s+zero3 on \d+ process\(es\)$",  # tables
            r".*\d+%\|.*\|",  # a progress bar
        )
    )
)


def foreign_lines(printed: str) -> list[str]:
    """The lines that are none of ours. A progress bar is written over itself, with control codes."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", printed)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip() and not _OURS.match(line)]
