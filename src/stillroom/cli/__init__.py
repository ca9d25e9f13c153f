"""Commands. Thin: parse, call, print. Nothing here imports torch before a command needs it."""
