"""What Hutch is compared with: a module a peer, which starts it, drives it and leaves nothing behind."""
