"""Data sets of head poses: AFLW2000-3D, BIWI, AFLW, 300W-LP, folders and zips of faces."""
