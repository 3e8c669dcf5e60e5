"""The command line: parse, call the SDK, render. No rule about boxes lives here."""
