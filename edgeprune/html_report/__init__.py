"""The report page of a bundle and its charts, also as SVG files; no page runs a script or loads anything."""
