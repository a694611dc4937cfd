"""Recipes: a system's configuration and its few functions over the modules below."""
