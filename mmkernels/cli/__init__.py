"""Floor 6: one file a command; each offers `add(subparsers)`."""
