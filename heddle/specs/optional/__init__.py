"""Kinds of ours that need a package which is not always there: they join where it is, through the door of `plugins`."""
