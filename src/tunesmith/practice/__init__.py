"""A hub of one's own, to practise on: what is pushed to it stays on this machine."""
