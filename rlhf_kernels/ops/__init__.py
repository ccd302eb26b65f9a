"""The operations: one file each, with its meaning, its formula and its torch definition."""
