"""The egress gateway: what stands at the one door of a box's network namespace."""
