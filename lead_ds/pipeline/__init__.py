"""LEAD's recipe from one configuration: stages that are public commands, each skipped when its output is complete."""
