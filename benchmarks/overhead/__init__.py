"""What the guard costs a serving engine, as ratios within one run."""
