"""What a person looks at: the report of a run, and its words. Reads run folders, never builds a model.

Imports nothing by itself; name the file you need.
"""
