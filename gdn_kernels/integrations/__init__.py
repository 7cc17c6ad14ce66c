"""The operators under the names, signatures and layouts of other libraries: one module for each, none imported here.

A module here never imports the library it stands in for, unless it says so.
"""
