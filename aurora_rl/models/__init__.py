"""The target: loaded, its parts, its caches, and faster forms of its modules."""
