"""What more than one op uses."""
