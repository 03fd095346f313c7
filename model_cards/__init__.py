"""The template of every model card, and the rendered cards of the recipes that were really run."""
