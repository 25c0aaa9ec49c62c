"""The attention-similarity repair: score heads, part them, align the suspicious ones, fine-tune head by head."""
