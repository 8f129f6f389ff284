"""``make bench``: speed and memory, mostly as ratios to other tools' taken in the same run."""
