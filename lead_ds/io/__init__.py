"""Files and what joins them to memory: atomic writes, JSON lines, mapped arrays, the hub, progress."""
