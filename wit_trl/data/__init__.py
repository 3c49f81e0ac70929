"""Rows of any type: their tokens, each with a region and a data weight; schemas, preparation, collators."""
