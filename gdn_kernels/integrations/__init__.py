"""Clients: the operators under the names and in the places of other libraries, one file each."""
