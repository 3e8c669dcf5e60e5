"""The measurements, in the order of a run. Each module has ``measure(stage) -> rows``."""
