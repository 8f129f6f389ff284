"""The same patches with other tools: hooks on a TransformerLens bridge, edits in an nnsight trace."""
