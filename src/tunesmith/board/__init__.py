"""A page in the browser over the runs, recipes and rows of a folder, for one person on one machine."""
