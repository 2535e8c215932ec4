"""Maths on tensors: a folder per op with the reference that defines it and the forms that are fast."""
