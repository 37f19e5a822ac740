"""HiP attention: attention over few key blocks, found by a tree search."""
