"""Black-box tests of the agent in the box."""
