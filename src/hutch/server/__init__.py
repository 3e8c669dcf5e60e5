"""The HTTP and WebSocket service over any `hutch.sdk.base.Runtime`."""
