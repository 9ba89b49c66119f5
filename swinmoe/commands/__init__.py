"""One thin file a command: typed config in, work done, a few lines said."""
