"""What every part of the house is set by: sections, their checks, how they are read, and registries of parts."""
