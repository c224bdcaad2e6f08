"""Every reader, given what no program of ours wrote."""
