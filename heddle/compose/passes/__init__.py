"""The passes of `heddle.compose.plan`, one a file: each a pure function from graph to graph."""
