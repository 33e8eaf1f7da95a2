"""A stranger's suite: it knows Barid by docs/protocol.md, docs/limits.md, README.md and deploy/ only."""
