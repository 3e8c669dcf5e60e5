"""Linux in small pieces, without rules about boxes: processes, control groups, id mappings, files."""
