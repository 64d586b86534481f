"""Small helpers without torch: files, disk, packages, units, HTML."""
