"""The page of a bundle and the charts on it and beside it; nothing here runs a script or loads anything."""
