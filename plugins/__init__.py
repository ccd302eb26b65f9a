"""Built-in plugins: each a folder with one class, imported as `rlhf_plugins.<name>`."""
