"""What the literature does, to compare with; nothing in plait uses it."""
